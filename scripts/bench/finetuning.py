"""What each way of fine-tuning gives: accuracy, trainable parameters, time per step, memory.

    uv run python scripts/bench/finetuning.py --data /data --work /tmp/finetuning --out docs/benchmarks/finetuning.md

DATA holds the folders flickr8k_train, fashion_train, fashion_val and grocery81 of shards. A small model is pretrained
on the first; each method then adapts it to the others by `clip-train finetune=METHOD`, the command that users run.
Runs that are complete in WORK are not run again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import median
from typing import NamedTuple

from measure import describe_machine
from photo_sets import first_of_each, samples, write_shard
from record import markdown_table

from clip_train.data.files import write_atomic
from clip_train.training.loggers.csv_logger import read_metrics

MODEL = [
    "model=vit_tiny",
    "model.image_size=48",
    "model.text.context_length=20",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
]
COMMON = [*MODEL, "data.num_workers=0", "logger=[csv]", "trainer.log_every=1", "eval.picture=false"]
PRETRAINING = ["data.caption_key=json\\:captions", "batch_size=128", "max_epochs=14", "optim.lr=1e-3"]
PRETRAINING += ["optim.weight_decay=0.1", "optim.warmup=6%", "eval.every=null"]
EPOCHS = {"fashion": 6, "grocery": 20}
FASHION_MOST, FASHION_LEAST = {"train": 80, "val": 30}, 40  # pictures of a class
TEMPLATES = ["a photo of {}.", "a picture of {}.", "{}."]

NOTES = """
The base is the model of the demo at 48 pixels, pretrained on 6,000 everyday photos (Flickr8k) for 14 epochs: it knows
little of either set. `fashion`: product photos of 60 x 80 pixels, 20 subcategories, at most 80 of each to learn from
(1,509) and 30 to be asked about (401), 6 epochs of batches of 64. `grocery`: 81 products, seven photos of each to
learn from (567) and three to be asked about, 20 epochs. Each method has one rate, which was not searched for; some
would do better with more steps. `top-1` and `per class`, the mean recall over the classes, are of the same pictures.

`classify` is `finetune.classify=true`, cross-entropy over the names of the classes; `prompt` and `linear_probe`
always learn so. `lit`, `lora` and `flyp` without it learn from pairs of a picture and its class's caption. `flyp,
distilled` learns from the run `full (classify)`, too. What learns more weights does better here, as the base knows
little of either set, and a linear head on its features does nearly as well on the set that has more pictures: which
is best with a strong base is for you to measure.

`cocoop` encodes every class for every picture, which takes too long here with 81 classes. `ms per step` is the median
of a run of 16 steps on fashion, `peak MB` the most memory of its process, libraries included (some 800). A
checkpoint's weights are meant, without the optimizer's state.
"""


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        name: for people.
        settings: overrides of `clip-train`.
        without: a set that it would take too long on.
    """

    name: str
    settings: list[str]
    without: str = ""


CLASSES = "data.caption_key=cls"
BY_NAMES = [CLASSES, "finetune.classify=true"]
METHODS = [
    Method("none", ["finetune=flyp", "optim.lr=0"]),
    Method("adapter (classify)", ["finetune=adapter", *BY_NAMES, "optim.lr=1e-2"]),
    Method("prompt (CoOp)", ["finetune=prompt", "finetune.n_ctx=4", "optim.lr=1e-2"]),
    Method("prompt (CoOp, per class)", ["finetune=prompt", "finetune.n_ctx=4", "finetune.csc=true", "optim.lr=1e-2"]),
    Method("cocoop", ["finetune=cocoop", "optim.lr=1e-2"], without="grocery"),
    Method("linear_probe", ["finetune=linear_probe", "optim.lr=1e-1"]),
    Method("lit (image tower locked)", ["finetune=lit", CLASSES, "optim.lr=1e-3"]),
    Method("lora", ["finetune=lora", CLASSES, "optim.lr=3e-3"]),
    Method("lora (classify)", ["finetune=lora", *BY_NAMES, "optim.lr=3e-3"]),
    Method("lora (DoRA, classify)", ["finetune=lora", "finetune.use_dora=true", *BY_NAMES, "optim.lr=3e-3"]),
    Method("flyp", ["finetune=flyp", "optim.lr=1e-3"]),
    Method("full (classify)", ["finetune=full", *BY_NAMES, "optim.lr=1e-3"]),
    Method("flyp, distilled", ["finetune=flyp", "optim.lr=1e-3", "distill=teacher", "distill.weights={teacher}"]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--work", type=Path, required=True, help="where shards and runs go")
    parser.add_argument("--out", type=Path, help="where to write the table")
    parser.add_argument("--only", default="", help="methods whose name contains this")
    args = parser.parse_args()
    base = pretrain(args.data, args.work)
    sets = {"fashion": write_fashion(args.data, args.work), "grocery": write_grocery(args.data, args.work)}
    rows = [measure(method, base, sets, args.work) for method in METHODS if args.only in method.name]
    accuracies = [f"{name} {metric}" for name in sets for metric in ("top-1", "per class")]
    header = ["method", "learns", "share", "checkpoint MB", "ms per step", "peak MB", *accuracies]
    machine = "".join(f"- {key}: {value}\n" for key, value in describe_machine().items())
    report = f"{machine}\n{markdown_table(header, rows)}{NOTES}"
    print(report)
    if args.out:
        write_atomic(args.out, report.encode())


def pretrain(data: Path, work: Path) -> Path:
    """A small model that has seen everyday photos and their captions; its checkpoint."""
    train(work, "base", [f"data.train.shards={data}/flickr8k_train/*.tar", *PRETRAINING])
    return newest_checkpoint(work / "base")


def write_fashion(data: Path, work: Path) -> Path:
    """Product photos with their subcategory as label, where there are enough of it, and no more than enough."""
    parts = {
        part: [(sample, json.loads(sample["json"])["subcategory"]) for sample in samples(data / f"fashion_{part}")]
        for part in FASHION_MOST
    }
    frequency = Counter(name for _, name in parts["train"])
    names = sorted(name for name, count in frequency.items() if count >= FASHION_LEAST)
    labels = {name: number for number, name in enumerate(names)}
    for part, content in parts.items():
        labelled = [(sample, labels[name]) for sample, name in content if name in labels]
        write_set(work / "fashion" / part, first_of_each(labelled, FASHION_MOST[part]), names)
    return work / "fashion"


def write_grocery(data: Path, work: Path) -> Path:
    """Seven photos of each class to learn from, three to be asked about."""
    names = json.loads((data / "grocery81" / "classes.json").read_text())["classnames"]
    everything = [(sample, int(sample["cls"])) for sample in samples(data / "grocery81")]
    train = first_of_each(everything, 7)
    keys = {sample["__key__"] for sample, _ in train}
    write_set(work / "grocery" / "train", train, names)
    write_set(work / "grocery" / "val", [pair for pair in everything if pair[0]["__key__"] not in keys], names)
    return work / "grocery"


def write_set(folder: Path, content: list[tuple[dict, int]], names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps({"classnames": names, "templates": TEMPLATES}))
    labelled = [{"__key__": sample["__key__"], "jpg": sample["jpg"], "cls": str(label)} for sample, label in content]
    write_shard(folder / "00000.tar", labelled)


def train(work: Path, name: str, settings: list[str]) -> float:
    """Run `clip-train` if it has not been; returns its peak memory in MB."""
    memory = work / name / "peak_memory"
    if not memory.exists():
        command = [sys.executable, "-m", "clip_train.commands.train", *COMMON, f"output_dir={work}", f"run_name={name}"]
        process = subprocess.Popen([*command, "resume=auto", *settings])
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{name} has failed: {' '.join(settings)}")
        memory.write_text(str(usage.ru_maxrss / 1e3))
    return float(memory.read_text())


def measure(method: Method, base: Path, sets: dict[str, Path], work: Path) -> list[str]:
    """A row of the table; sizes, time and memory are those of the first set."""
    name, folder = next(iter(sets.items()))
    tops = [value for name, folder in sets.items() for value in accuracy(method, base, name, folder, work)]
    if method.name == "none":
        return [method.name, "0", "", "", "", "", *tops]
    short = run_name("time", method)
    peak = train(work, short, [*settings(method, base, name, folder), "max_steps=16", "eval.zero_shot=null"])
    return [method.name, *sizes(work / short), f"{milliseconds_per_step(work / short):.0f}", f"{peak:.0f}", *tops]


def accuracy(method: Method, base: Path, name: str, folder: Path, work: Path) -> list[str]:
    if name == method.without:
        return ["", ""]
    run = run_name(name, method)
    length = "max_steps=1" if method.name == "none" else f"max_epochs={EPOCHS[name]}"
    train(work, run, [*settings(method, base, name, folder), length])
    metrics = json.loads((work / run / "summary.json").read_text())["metrics"]
    return [f"{metrics[f'zero_shot/{name}/{metric}']:.1%}" for metric in ("top1", "mean_per_class_recall")]


def settings(method: Method, base: Path, name: str, folder: Path) -> list[str]:
    shards = [f"data.train.shards={folder}/train/*.tar", f"eval.zero_shot={{{name}: '{folder}/val/*.tar'}}"]
    learned = list((base.parents[2] / f"{name}-full-classify" / "checkpoints").glob("*.ckpt"))
    chosen = [setting.replace("{teacher}", str(max(learned, default=""))) for setting in method.settings]
    return [f"init_from={base}", *shards, "batch_size=64", "eval.every=null", *chosen]


def run_name(name: str, method: Method) -> str:
    return f"{name}-{re.sub('[^a-z]+', '-', method.name.lower()).strip('-')}"


def sizes(run: Path) -> tuple[str, str, str]:
    """Weights that learn, their share of all, and what a checkpoint's weights take."""
    summary = json.loads((run / "summary.json").read_text())
    learns, share = summary["trainable_parameters"], summary["trainable_parameters"] / summary["parameters"]
    megabytes = (newest_checkpoint(run) / "model.safetensors").stat().st_size / 1e6
    return f"{learns:,}", f"{share:.2%}", f"{megabytes:.2f}"


def milliseconds_per_step(run: Path) -> float:
    """The median without the first steps."""
    speeds = [float(row["train/samples_per_second"] or "nan") for row in read_metrics(run / "metrics.csv")[1]]
    return median(1e3 * 64 / speed for speed in speeds[4:] if speed > 0)


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("*.ckpt"))


if __name__ == "__main__":
    main()
