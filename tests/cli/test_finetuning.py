"""Fine-tuning as a user meets it: adapter-only checkpoints, what they go onto, and what is exported of them."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModel

from clip_train.checkpoints.folder import list_checkpoints, read_ema_weights, read_manifest, read_weights, verify
from clip_train.interop.joining import read_whole
from tests.cli.runs import clip_train
from tests.cli.test_weights import MODEL, clip_export
from tests.interop.tiny import CLIP, assert_close, assert_equal, ours, pixels

COMMON = [
    *MODEL,
    "experiment=demo",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "batch_size=16",
    "data.num_workers=0",
    "data.val.shards=null",
    "eval.every=null",
    "optim.warmup=0",
    "checkpoint.every=2",
    "checkpoint.keep=9",
]
LORA = ["finetune=lora", "finetune.rank=2", "max_steps=4", "ema.decay=0.5"]


def train(folder: Path, name: str, *arguments: str):
    return clip_train(*COMMON, f"output_dir={folder}", f"run_name={name}", *arguments, timeout=600)


def done(process):
    assert process.returncode == 0, process.stdout + process.stderr
    return process


def refused(process) -> str:
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stdout + process.stderr
    return process.stderr


def last(folder: Path, name: str) -> Path:
    return list_checkpoints(folder / name / "checkpoints")[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of a run `base`, and of runs `lora` and `adapter` that start from it."""
    folder = tmp_path_factory.mktemp("runs")
    done(train(folder, "base", "max_steps=2"))
    init = f"init_from={last(folder, 'base')}"
    said = done(train(folder, "lora", *LORA, init)).stdout
    assert re.search(r"finetune +lora\b", said)
    assert re.search(r"trainable +12,800 = 0\.\d+% \(image tower 8,192, text tower 4,608\)", said)
    done(train(folder, "adapter", "finetune=adapter", "max_steps=2", init))
    return folder


def test_a_checkpoint_holds_what_learns_and_names_its_base(folder):
    found = read_weights(last(folder, "lora"))
    assert found and all("lora_" in name for name in found)
    assert {name.split(".")[1] for name in read_weights(last(folder, "adapter"))} == {"image_adapter"}
    for name in ("lora", "adapter"):
        manifest = read_manifest(last(folder, name))
        base = manifest.about["base"]
        assert base["weights"] == str(last(folder, "base")) and len(base["checksum"]) == 64 and not base["ema"]
        whole = read_manifest(last(folder, "base")).files["model.safetensors"].bytes
        assert sum(file.bytes for file in manifest.files.values()) < whole / 20


def test_merged_weights_are_known_by_what_they_were_merged_from(folder):
    base, merged = (read_whole(str(last(folder, name)), "weights") for name in ("base", "lora"))
    assert merged.checksum().partition("+")[2] == base.checksum()
    elsewhere = replace(merged, tensors={name: tensor * (1 + 1e-7) for name, tensor in merged.tensors.items()})
    assert elsewhere.checksum() == merged.checksum() != base.checksum()


def test_resumed_it_ends_with_the_same_bytes(folder, tmp_path):
    """Once with the base that the checkpoint names, once with a copy of it in another layout."""
    half = list_checkpoints(folder / "lora" / "checkpoints")[0]
    done(clip_export(f"weights={last(folder, 'base')}", f"output={tmp_path / 'b'}", "format=open_clip"))
    done(train(tmp_path, "named", *LORA, f"resume={half}"))
    done(train(tmp_path, "copied", *LORA, f"resume={half}", f"init_from={tmp_path / 'b'}"))
    expected = verify(last(folder, "lora")).files
    for run in ("named", "copied"):
        found = verify(last(tmp_path, run)).files
        for file in ("model.safetensors", "optimizer.safetensors", "ema.safetensors"):
            assert found[file] == expected[file], (run, file)


def test_killed_after_its_first_checkpoint_it_ends_with_the_same_bytes(folder, tmp_path):
    shutil.copytree(folder / "lora", tmp_path / "lora")
    shutil.rmtree(last(tmp_path, "lora"))
    (tmp_path / "lora" / "summary.json").unlink()
    done(train(tmp_path, "lora", *LORA, f"init_from={last(folder, 'base')}", "resume=auto"))
    found, expected = (verify(last(where, "lora")).files for where in (tmp_path, folder))
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert found["optimizer.safetensors"] == expected["optimizer.safetensors"]


def test_another_base_or_none_is_refused(folder, tmp_path):
    half = list_checkpoints(folder / "lora" / "checkpoints")[0]
    done(train(tmp_path, "other", "max_steps=1", "seed=7"))
    other = last(tmp_path, "other")
    message = refused(train(tmp_path, "run", *LORA, f"resume={half}", f"init_from={other}"))
    assert f"{half} goes onto another base than {other}" in message
    moved = tmp_path / "moved"
    shutil.copytree(last(folder, "lora"), moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["about"]["base"]["weights"] = str(tmp_path / "gone")
    (moved / "manifest.json").write_text(json.dumps(manifest))
    message = refused(clip_export(f"weights={moved}", f"output={tmp_path / 'out.safetensors'}"))
    assert "holds only what was added to its base, which cannot be read" in message and "gone: not there" in message
    base = f"base={last(folder, 'base')}"
    done(clip_export(f"weights={moved}", f"output={tmp_path / 'out.safetensors'}", base))
    assert_equal(load_file(tmp_path / "out.safetensors"), read_whole(str(last(folder, "lora")), "weights").tensors)
    assert "goes onto another base" in refused(
        clip_export(f"weights={moved}", f"output={tmp_path / 'no.safetensors'}", f"base={other}")
    )
    for keys, said in (
        (["finetune=lora"], "finetune=lora adds to weights that were trained: give init_from=WEIGHTS"),
        (["finetune=lit"], "finetune=lit locks random weights"),
        (["finetune=lit", "finetune.unlocked_groups=-1"], "finetune.unlocked_groups=-1 is not a whole number"),
        (["init_from_ema=true"], "init_from_ema=true says nothing without init_from"),
    ):
        assert said in refused(train(tmp_path, "run", "max_steps=1", *keys))
    assert not (tmp_path / "run").exists()


def test_merged_it_is_exported_and_trained_on(folder, tmp_path):
    done(clip_export(f"weights={last(folder, 'lora')}", f"output={tmp_path / 'hf'}", "format=huggingface"))
    merged = read_whole(str(last(folder, "lora")), "weights").tensors
    model = ours(CLIP, merged)
    with torch.no_grad():
        features = AutoModel.from_pretrained(tmp_path / "hf").get_image_features(pixels()).pooler_output
    assert_close(F.normalize(features), model.encode_image(pixels()))
    still = ["max_steps=1", "optim.lr=0", "optim.weight_decay=0", f"init_from={last(folder, 'lora')}"]
    done(train(tmp_path, "merged", *still))
    found = {name.removeprefix("model."): w for name, w in read_weights(last(tmp_path, "merged")).items()}
    assert_equal(found, merged)
    base = {name.removeprefix("model."): w for name, w in read_weights(last(folder, "base")).items()}
    changed = {name for name, weight in base.items() if not torch.equal(weight, merged[name])}
    assert changed and all(".blocks." in name or ".layers." in name for name in changed)


def test_a_clip_adapter_leaves_in_our_own_layout_only(folder, tmp_path):
    adapter = f"weights={last(folder, 'adapter')}"
    done(clip_export(adapter, f"output={tmp_path / 'all.safetensors'}"))
    found = load_file(tmp_path / "all.safetensors")
    assert {name for name in found if "adapter" in name} == {"image_adapter.down.weight", "image_adapter.up.weight"}
    assert found.keys() > {name.removeprefix("model.") for name in read_weights(last(folder, "base"))}
    for format in ("huggingface", "open_clip", "openai", "onnx"):
        message = refused(clip_export(adapter, f"output={tmp_path / 'out'}", f"format={format}"))
        assert "has a CLIP-Adapter, which cannot be merged into the towers" in message
    begun = train(tmp_path, "run", "max_steps=1", f"init_from={last(folder, 'adapter')}")
    assert "has a CLIP-Adapter" in refused(begun)


def test_interpolated_and_averaged_weights(folder, tmp_path):
    lora, base = last(folder, "lora"), last(folder, "base")
    output = tmp_path / "wise.safetensors"
    done(clip_export(f"weights={lora}", f"interpolate={base}", "alpha=0.25", f"output={output}"))
    begin, end = read_whole(str(base), "weights").tensors, read_whole(str(lora), "weights").tensors
    for name, weight in load_file(output).items():
        torch.testing.assert_close(weight, 0.75 * begin[name] + 0.25 * end[name])
    assert "alpha=2 is a share" in refused(
        clip_export(f"weights={lora}", f"interpolate={base}", "alpha=2", f"output={output}")
    )

    done(clip_export(f"weights={lora}", "ema=true", f"output={tmp_path / 'ema.safetensors'}"))
    averaged = load_file(tmp_path / "ema.safetensors")
    assert averaged.keys() == end.keys() and any(not torch.equal(averaged[name], end[name]) for name in end)
    assert read_ema_weights(lora).keys() == read_weights(lora).keys()
    still = ["max_steps=1", "optim.lr=0", "optim.weight_decay=0", f"init_from={lora}"]
    done(train(tmp_path, "averaged", *still, "init_from_ema=true"))
    found = {name.removeprefix("model."): w for name, w in read_weights(last(tmp_path, "averaged")).items()}
    assert_equal(found, averaged)
    assert "it has no averaged weights" in refused(
        clip_export(f"weights={base}", "ema=true", f"output={tmp_path / 'no.safetensors'}")
    )
    assert "is no checkpoint of ours" in refused(
        clip_export(f"weights={output}", "ema=true", f"output={tmp_path / 'no.safetensors'}")
    )
