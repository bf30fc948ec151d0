"""What a model that this project trained is worth by `clip-eval`, and by clip-benchmark on the same weights, exported.

    uv run python scripts/bench/evaluation.py --data /data --work /tmp/evaluation --out docs/benchmarks

DATA holds the folders flickr8k_train, flickr8k_val, emoji, cifar10_test2000 and grocery81 of shards. A small CLIP is
pretrained on the first and the emoji by `clip-train`, and asked about the others, none of which it has seen; then it
goes on with most photos of the groceries and their long descriptions, and is asked about the rest. Runs that are
complete in WORK are not run again.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from clip_benchmark import cli
from clip_benchmark.metrics import zeroshot_classification
from measure import describe_machine
from photo_sets import first_of_each, samples, write_benchmark_set, write_classes, write_shard
from record import markdown_table

from clip_train.data.files import write_atomic
from clip_train.data.long_captions import split_sentences

MODEL = [
    "model=vit_b_32",
    "model.image_size=48",
    "model.embed_dim=256",
    "+model.vision.options={patch_size:8,embed_dim:192,depth:4,num_heads:3}",
    *("model.text.width=192", "model.text.layers=3", "model.text.heads=3", "model.text.context_length=32"),
]
COMMON = ["trainer.accelerator=cpu", "trainer.precision=32", "data.num_workers=0", "logger=[csv]"]
COMMON += ["eval.every=null", "eval.picture=false"]
PRETRAINING = ["data.caption_key=[json:captions,txt]", "batch_size=256", "max_epochs=10", "optim.lr=1e-3"]
PRETRAINING += ["optim.weight_decay=0.2", "optim.warmup=5%"]
GROCERIES = ["data.caption_key=json\\:captions", "batch_size=64", "max_epochs=30", "optim.lr=5e-4", "optim.warmup=5%"]
CLIP_BENCHMARKS = {"zero_shot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}

NOTES = """
The model has 48 pixels in patches of 8, four layers of 192 for them, three of 192 for 32 tokens, and was trained by
`clip-train` from nothing, for 10 epochs of Flickr8k's 6,000 training photos and 6,651 drawings of emoji. It has seen
no picture of the sets above. `clip-benchmark` is its own program on the folder that `clip-export format=open_clip`
wrote of the same checkpoint; it has no linear probe like ours.

`linear_probe` and `long_text` take groceries apart, seven photos of each product to learn from and three to be asked
about; CIFAR-10's 200 test pictures of a class by 150 and 50. For `long_text` the model goes on with `finetune=full` on
the names and the sentences of the descriptions of the photos to learn from, 30 epochs, one caption drawn at a time. A
description has 10 to 114 tokens, half of them more than 37; the model reads 30 at once. Texts are the 81 descriptions,
images the 243 photos that are left.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--work", type=Path, required=True, help="where sets, runs and results go")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write evaluation.md")
    args = parser.parse_args()
    sets = args.work / "sets"
    write_sets(args.data, sets)
    photos = f"data.train.shards={args.data}/flickr8k_train/*.tar::{args.data}/emoji/train/*.tar"
    base = train(args.work, "base", [*MODEL, photos, *PRETRAINING])
    descriptions = f"data.train.shards={sets}/described/train/*.tar"
    tuned = train(args.work, "groceries", [*MODEL, descriptions, *GROCERIES, "finetune=full", f"init_from={base}"])
    machine = "".join(f"- {key}: {value}\n" for key, value in describe_machine(["torch", "clip-benchmark"]).items())
    report = "\n".join([machine, compared(base, sets, args.work), probed(base, sets, args.work)])
    report += f"\n{long_texts(tuned, sets, args.work)}{NOTES}"
    print(report)
    if args.out:
        write_atomic(args.out / "evaluation.md", report.encode())


def write_sets(data: Path, sets: Path) -> None:
    """The sets as clip-benchmark reads them, whole and, to learn from, in two parts."""
    for name, source, most in (("cifar10", "cifar10_test2000", 150), ("grocery81", "grocery81", 7)):
        everything = list(samples(data / source))
        train = [sample for sample, _ in first_of_each([(sample, int(sample["cls"])) for sample in everything], most)]
        keys = {sample["__key__"] for sample in train}
        rest = [sample for sample in everything if sample["__key__"] not in keys]
        write_benchmark_set(sets / name, {"test": everything})
        write_benchmark_set(sets / f"{name}_apart", {"train": train, "test": rest})
        for folder in (sets / name, sets / f"{name}_apart"):
            write_classes(folder, data / source / "classes.json")
        if name == "grocery81":
            write_shard(sets / "described" / "train" / "0.tar", [described(sample) for sample in train])
    pictures = [{**sample, "txt": five_lines(sample)} for sample in samples(data / "flickr8k_val")]
    write_benchmark_set(sets / "flickr8k", {"test": pictures})
    (sets / "flickr8k" / "dataset_type.txt").write_text("retrieval")


def five_lines(sample: dict[str, Any]) -> bytes:
    return "\n".join(json.loads(sample["json"])["captions"]).encode()


def described(sample: dict[str, Any]) -> dict[str, Any]:
    """A photo with its name and each sentence of its description as captions."""
    captions = [sample["txt"].decode(), *split_sentences(json.loads(sample["json"])["description"])]
    return {"__key__": sample["__key__"], "jpg": sample["jpg"], "json": json.dumps({"captions": captions}).encode()}


def train(work: Path, name: str, settings: list[str]) -> Path:
    """A checkpoint of `clip-train`, which runs if it has not."""
    run("train", *COMMON, f"output_dir={work}", f"run_name={name}", "resume=auto", *settings)
    return max((work / name / "checkpoints").glob("*.ckpt"))


def run(program: str, *settings: str) -> None:
    command = [sys.executable, "-m", f"clip_train.commands.{program}", *settings]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit(f"failed: {' '.join(command)}")


def evaluate(task: str, weights: Path, data: Path, output: Path, *settings: str) -> Path:
    """The folder of results of `clip-eval`."""
    if not (output / "results.json").exists():
        run("evaluate", f"task={task}", f"weights={weights}", f"data={data}", f"output={output}", *settings)
    return output


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "results.json").read_text())["metrics"]


def compared(base: Path, sets: Path, work: Path) -> str:
    """Zero-shot classification and retrieval, by both programs."""
    exported = work / "open_clip"
    if not exported.exists():
        run("export", f"weights={base}", f"output={exported}", "format=open_clip")
    rows = []
    for task, name in (("zero_shot", "cifar10"), ("zero_shot", "grocery81"), ("retrieval", "flickr8k")):
        ours = metrics(evaluate(task, base, sets / name, work / f"ours_{name}"))
        theirs = clip_benchmarks(exported, CLIP_BENCHMARKS[task], sets / name, work / f"theirs_{name}.json")
        for metric, value in ours.items():
            other = theirs.get(metric)
            beside = [] if other is None else [f"{other:.6f}", f"{abs(value - other):.1e}"]
            rows.append([name, metric, f"{value:.6f}", *(beside or ["", ""])])
    return markdown_table(["set", "metric", "clip-eval", "clip-benchmark", "difference"], rows)


def clip_benchmarks(model: Path, task: str, data: Path, output: Path) -> dict[str, float]:
    """What clip-benchmark finds, in this process."""
    # It takes float() of arrays of one number, which numpy does no more.
    theirs: Any = zeroshot_classification
    theirs.float = lambda value: np.asarray(value, dtype=np.float64).item()
    recalls = ["--recall_k", "1", "5", "10"]
    sys.argv = ["clip_benchmark", "eval", "--no_amp", "--num_workers=0", "--batch_size=64", f"--output={output}"]
    sys.argv += [f"--model=local-dir:{model}", "--pretrained=", f"--task={task}", f"--dataset=wds/{data.name}"]
    sys.argv += [f"--dataset_root={data}", "--skip_existing", *recalls]
    cli.main()
    return json.loads(output.read_text())["metrics"]


def probed(base: Path, sets: Path, work: Path) -> str:
    """The linear probe, its search of the regularisation included."""
    names = ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall", "C", "validation_acc1")
    cache = f"data.cache_dir={work}/features"
    found = {
        name: metrics(evaluate("linear_probe", base, sets / f"{name}_apart", work / f"probe_{name}", cache))
        for name in ("cifar10", "grocery81")
    }
    return markdown_table(["linear_probe", *names], [[n, *(f"{m[k]:.4g}" for k in names)] for n, m in found.items()])


def long_texts(tuned: Path, sets: Path, work: Path) -> str:
    """Retrieval by long descriptions, a row for each way to embed them."""
    folder = evaluate("long_text", tuned, sets / "grocery81_apart", work / "long_text")
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[1] if "retrieval_recall" in name or "median_rank" in name]
    cells = [[row["variant"], *(f"{float(row[name]):.4g}" for name in names)] for row in rows if row["variant"]]
    return markdown_table(["long_text", *names], cells)


if __name__ == "__main__":
    main()
