"""The README.md of an exported model: what it saw, how good it was, how to use it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from clip_train.interop.model_source import ModelSource

_SECRET = ("logger", "output_dir", "run_name", "checkpoint")  # of no use to a reader, or private
_LIBRARY = {"huggingface": "transformers", "open_clip": "open_clip", "onnx": "onnx"}
_USAGE = {
    "huggingface": """\
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
inputs = processor(images=[image], text=captions, padding="max_length", truncation=True, return_tensors="pt")
outputs = model(**inputs)  # image_embeds, text_embeds, logits_per_image
""",
    "open_clip": """\
import open_clip

model, preprocess = open_clip.create_model_from_pretrained("local-dir:" + FOLDER)
tokenizer = open_clip.get_tokenizer("local-dir:" + FOLDER)
image_embeds = model.encode_image(preprocess(image)[None], normalize=True)
text_embeds = model.encode_text(tokenizer(captions), normalize=True)
""",
    "onnx": """\
import onnxruntime
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained(FOLDER)
image_tower, text_tower = (onnxruntime.InferenceSession(FOLDER + name) for name in ("/image.onnx", "/text.onnx"))
inputs = processor(images=[image], text=captions, padding="max_length", truncation=True, return_tensors="np")
(image_embeds,) = image_tower.run(None, {"pixel_values": inputs["pixel_values"]})
(text_embeds,) = text_tower.run(None, {"input_ids": inputs["input_ids"]})
# both are unit vectors; logits are LOGIT_SCALE times their products
""",
}


def model_card(source: ModelSource, format: str) -> str:
    """Markdown, with the metadata that the Hugging Face Hub reads."""
    scale = float(source.model.logit_scale.exp())
    usage = _USAGE[format].replace("LOGIT_SCALE", f"{scale:.4f}")
    sections = [
        "---",
        yaml.safe_dump({"library_name": _LIBRARY[format], "pipeline_tag": "zero-shot-image-classification"}).strip(),
        "tags: [clip, clip_train]",
        "---",
        f"# {_title(source)}",
        "",
        f"{'Trained' if source.manifest else 'Exported'} with clip_train. {_count(source):,} parameters; images of"
        f" {source.image_size} x {source.image_size} pixels; embeddings of {source.embed_dim} numbers.",
        "",
        "## Use",
        "",
        f"```python\n{usage}```",
        "",
        *_training(source),
        "## Model config",
        "",
        f"```yaml\n{yaml.safe_dump(dict(source.config), sort_keys=False)}```",
    ]
    return "\n".join(sections) + "\n"


def _title(source: ModelSource) -> str:
    config = source.manifest.about.get("config", {}) if source.manifest else {}
    return str(config.get("model_name") or source.vision_name)


def _count(source: ModelSource) -> int:
    return sum(parameter.numel() for parameter in source.model.parameters())


def _training(source: ModelSource) -> list[str]:
    """What the checkpoint tells of its run."""
    if source.manifest is None:
        return [f"Its weights were read from `{Path(source.name).name}`; how they were trained is not known here.", ""]
    about = source.manifest.about
    config, data = about.get("config", {}), about.get("data", {})
    lines = ["## Training", "", f"- samples seen: {source.manifest.samples_seen:,}"]
    if "samples" in data:
        lines.append(f"- samples in the data set: {data['samples']:,}")
    lines += [f"- {name}: {value}" for name, value in _settings(config)]
    lines += ["", *_metrics(about.get("metrics", {}))]
    settings = {name: value for name, value in config.items() if name not in (*_SECRET, "model")}
    return [*lines, "## Training config", "", f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```", ""]


def _settings(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    shards = config.get("data", {}).get("train", {}).get("shards")
    loss = str(config.get("loss", {}).get("_target_", "")).rpartition(".")[2]
    named = (("data", shards), ("batch size", config.get("batch_size")), ("loss", loss), ("seed", config.get("seed")))
    return [(name, value) for name, value in named if value not in (None, "")]


def _metrics(metrics: Mapping[str, float]) -> list[str]:
    shown = {name: value for name, value in sorted(metrics.items()) if not name.startswith("train/")}
    if not shown:
        return []
    rows = [f"| {name} | {value:.4f} |" for name, value in shown.items()]
    return ["## Metrics", "", "| metric | value |", "|---|---|", *rows, ""]
