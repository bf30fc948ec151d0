"""Linear probe and learned prompts: what they compute, what learns, what they refuse."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from clip_train.data.class_names import ClassNames
from clip_train.data.tokenizer import ClipTokenizer
from clip_train.errors import ConfigError
from clip_train.models import create_dual_encoder, prompt_learner
from clip_train.models.adaptation import adapt
from clip_train.models.classifiers import Task
from clip_train.models.linear_probe import LinearProbe
from clip_train.models.name_classifier import NameClassifier
from clip_train.models.prompt_learner import PromptLearner
from tests.models.test_dual_encoder import TINY, random_batch

CLASSES = ClassNames(("apple", "red apple", "pear"), ("a photo of a {}.",))
TASK = Task(CLASSES, ClipTokenizer(16))
PROMPT = {"method": "prompt", "n_ctx": 4, "csc": False, "init": "a photo of a", "conditional": False}
PROBE = {"method": "linear_probe", "features": "embedding", "head": "zeros"}
LABELS = torch.tensor([0, 2, 1, 1])


def adapted(**settings: Any) -> Any:
    torch.manual_seed(1)
    return adapt(create_dual_encoder(**TINY), settings, TASK)


def base() -> Any:
    torch.manual_seed(1)
    return create_dual_encoder(**TINY).eval()


def pixels() -> torch.Tensor:
    return random_batch(4)[0]


def learning(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def texts(captions: list[str]) -> torch.Tensor:
    return base().encode_text(torch.from_numpy(TASK.tokenizer(captions)))


@pytest.mark.parametrize("features", ["embedding", "trunk"])
def test_a_probe_is_a_linear_layer_on_frozen_features(features):
    probe = adapted(method="linear_probe", features=features, head="zeros")
    assert isinstance(probe, LinearProbe)
    model = base()
    normalised = (pixels().float() - model.image_mean) / model.image_std
    expected = model.encode_image(pixels()) if features == "embedding" else model.vision.trunk(normalised)
    found = probe.image_features(pixels())
    assert torch.allclose(found, expected, atol=1e-6)
    assert learning(probe) == {"head.weight": (3, expected.shape[1]), "head.bias": (3,)}
    torch.nn.init.normal_(probe.head.weight)
    logits = found @ probe.head.weight.T + probe.head.bias
    losses, hits = probe(found, LABELS)
    assert torch.allclose(losses, F.cross_entropy(logits, LABELS, reduction="none"))
    assert hits.tolist() == (logits.argmax(1) == LABELS).float().tolist() and not hits.requires_grad
    assert torch.allclose(probe.make_classifier(CLASSES)(pixels()), logits, atol=1e-5)


def test_a_probe_can_start_from_the_class_names():
    probe = adapted(method="linear_probe", features="embedding", head="zero_shot")
    embeddings = texts(["a", "b", "c"])
    probe.start_from_names(embeddings)
    expected = base().logit_scale.exp() * base().encode_image(pixels()) @ embeddings.T
    assert torch.allclose(probe.make_classifier(CLASSES)(pixels()), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["linear_probe", "prompt"])
def test_weights_of_the_base_keep_their_names_and_stay(method):
    settings = PROMPT if method == "prompt" else {"method": method, "features": "trunk", "head": "zeros"}
    model, names = adapted(**settings), set(base().state_dict())
    assert names < set(model.state_dict())
    assert set(model.state_dict()) - names == set(learning(model))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base().state_dict().items())
    model.train()
    assert not model.vision.training and not model.text.training


@pytest.mark.parametrize("csc", [False, True])
def test_a_context_of_words_is_those_words(csc):
    model = adapted(**PROMPT | {"csc": csc})
    assert isinstance(model, PromptLearner)
    assert learning(model) == {"context": (3, 4, 64) if csc else (4, 64)}
    words = texts([f"a photo of a {name}." for name in CLASSES.names])
    logits = base().logit_scale.exp() * base().encode_image(pixels()) @ words.T
    losses, hits = model(pixels(), LABELS)
    assert torch.allclose(losses, F.cross_entropy(logits, LABELS, reduction="none"), atol=1e-5)
    assert hits.tolist() == (logits.argmax(1) == LABELS).float().tolist()
    cosines = model.make_classifier(CLASSES)(pixels())
    assert torch.allclose(base().logit_scale.exp() * cosines, logits, atol=1e-5)
    losses.mean().backward()
    assert model.context.grad is not None
    assert model.context.grad.abs().amin(dim=-1).count_nonzero() == model.context[..., 0].numel()


def test_a_shared_context_goes_before_other_names():
    model = adapted(**PROMPT)
    other = model.make_classifier(ClassNames(("plum", "fig"), ("{}",)))(pixels())
    assert torch.allclose(other, base().encode_image(pixels()) @ texts(["a photo of a plum.", "a photo of a fig."]).T)


def test_a_picture_shifts_its_own_context():
    model = adapted(**PROMPT | {"conditional": True})
    assert set(learning(model)) == {"context", *(f"meta_net.{n}.{part}" for n in (0, 2) for part in ("weight", "bias"))}
    torch.nn.init.normal_(model.meta_net[2].weight)
    losses, _ = model(pixels(), LABELS)
    for number in range(4):
        image = model.encode_image(pixels()[number : number + 1])
        shifted = adapted(**PROMPT)
        shifted.context.data += model.meta_net(image)
        alone, _ = shifted(pixels()[number : number + 1], LABELS[number : number + 1])
        assert alone.item() == pytest.approx(losses[number].item(), abs=1e-4)
    scores = model.make_classifier(CLASSES)(pixels())
    assert torch.allclose(F.cross_entropy(scores, LABELS, reduction="none"), losses, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"csc": True}, {"conditional": True}])
def test_with_checkpointing_prompts_are_encoded_again_in_parts(settings, monkeypatch):
    monkeypatch.setattr(prompt_learner, "_RECOMPUTED_AT_ONCE", 2)
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = adapt(create_dual_encoder(**TINY, grad_checkpointing=checkpointing), PROMPT | settings, TASK).train()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = model(pixels(), LABELS)[0].mean()
        found.append((loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]), sum(kept)))
    *plain, plain_kept = found[0]
    *again, again_kept = found[1]
    torch.testing.assert_close(again, plain)
    assert again_kept < plain_kept / 4


def test_noise_starts_small_and_differs():
    context = adapted(**PROMPT | {"init": None, "n_ctx": 8}).context
    assert context.shape == (8, 64) and 0.01 < context.std().item() < 0.03


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PROMPT | {"n_ctx": 14}, r"finetune.n_ctx=14 is not from 1 to 13"),
        (PROMPT | {"n_ctx": 5}, r"finetune.init='a photo of a' is 4 tokens, finetune.n_ctx=5"),
        (PROMPT | {"csc": True, "conditional": True}, r"finetune.csc and finetune.conditional do not go together"),
        (
            {"method": "linear_probe", "features": "x", "head": "zeros"},
            r"finetune.features=x is none of embedding, trunk",
        ),
        ({"method": "linear_probe", "features": "trunk", "head": "zero_shot"}, r"needs finetune.features=embedding"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        adapted(**settings)


@pytest.mark.parametrize("settings", [PROMPT, PROBE])
def test_what_was_learned_of_classes_is_not_exported(settings):
    with pytest.raises(ConfigError, match="which is not part of a model of images and texts: take the weights of its"):
        adapt(create_dual_encoder(**TINY), settings)


def test_another_text_tower_takes_no_vectors():
    siglip = {**TINY, "text": {**TINY["text"], "name": "siglip", "proj": "none", "width": 32}}
    with pytest.raises(ConfigError, match="finetune=prompt puts vectors into CLIP's text tower"):
        adapt(create_dual_encoder(**siglip), PROMPT, TASK)


NAMES = ClassNames(CLASSES.names, ("a photo of a {}.", "{}"))
ADAPTER = {"method": "adapter", "towers": ["image"], "ratio": 0.5, "reduction": 4, "train_logit_scale": False}
LORA = {"method": "lora", "towers": ["text"], "rank": 2, "alpha": 4, "dropout": 0.0, "use_dora": False}


def test_names_classify_by_the_mean_of_their_captions():
    model = NameClassifier(adapted(**ADAPTER), NAMES, TASK.tokenizer)
    means = texts([f"a photo of a {name}." for name in NAMES.names]) + texts(list(NAMES.names))
    unit = F.normalize(means, dim=-1)
    logits = base().logit_scale.exp() * model.encode_image(pixels()) @ unit.T
    losses, hits = model(pixels(), LABELS)
    assert torch.allclose(losses, F.cross_entropy(logits, LABELS, reduction="none"), atol=1e-5)
    assert hits.tolist() == (logits.argmax(1) == LABELS).float().tolist()
    assert set(learning(model)) == {"image_adapter.down.weight", "image_adapter.up.weight"}
    assert model.state_dict().keys() == adapted(**ADAPTER).state_dict().keys()


def test_names_are_encoded_once_unless_their_tower_learns():
    both = ADAPTER | {"towers": ["image", "text"]}
    for settings, encoded in ((ADAPTER, 1), (both, 1), ({**LORA, "target_modules": {"text": None}}, 2)):
        model = NameClassifier(adapted(**settings), NAMES, TASK.tokenizer)
        calls: list = []
        model.text.register_forward_pre_hook(lambda *call, calls=calls: calls.append(call))
        for _ in range(2):
            losses, _ = model(pixels(), LABELS)
            losses.mean().backward()
        assert len(calls) == encoded
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
