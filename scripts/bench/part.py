"""Run a program and keep what it prints as a section of a record, line by line: if it is killed, what it said stays.

python scripts/bench/part.py RECORD HEAD TITLE COMMAND...
"""

import os
import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from threading import Thread

from record import write_section


def main() -> None:
    path, head, title, *command = sys.argv[1:]
    said: list[str] = []
    complaints: deque[str] = deque(maxlen=20)

    def write(end: str) -> None:
        write_section(Path(path), f"# {head}\n", title, f"{_shown(said)}\n\n{end}")

    begun = time.monotonic()
    environment, pipe = {**os.environ, "PYTHONUNBUFFERED": "1"}, subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, errors="replace") as program:

        def pass_on() -> None:
            for line in program.stderr or ():
                print(line, end="", file=sys.stderr, flush=True)
                complaints.append(line)

        listener = Thread(target=pass_on)
        listener.start()
        for line in program.stdout or ():
            said.append(line)
            write("Not finished.")
        listener.join()
    end = f"It took {time.monotonic() - begun:.0f} s"
    if program.returncode:
        write(f"{end} and failed, with exit code {program.returncode}:\n\n{_fenced(''.join(complaints))}")
        sys.exit(1)
    write(f"{end}.")


def _shown(lines: list[str]) -> str:
    """As it is if there is a table in it, else as code; headings below that of a section."""
    text = "".join(lines)
    return re.sub("^#", "###", text, flags=re.MULTILINE).strip() if "\n|" in text else _fenced(text)


def _fenced(text: str) -> str:
    return "```\n" + re.sub("^## ", " ## ", text, flags=re.MULTILINE).strip("\n") + "\n```" if text.strip() else ""


if __name__ == "__main__":
    main()
