"""Blocks computed again in backward: the same gradients, less memory, and of `selective` no product twice."""

import copy
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from clip_train.errors import ConfigError
from clip_train.models import DualEncoder, create_dual_encoder
from clip_train.models.activation_checkpointing import (
    BLOCKS,
    MODES,
    NONE,
    SELECTIVE,
    _Policy,
    checkpoint_blocks,
    checkpointing_mode,
    explained_recomputation,
)
from clip_train.models.cpu_attention import fast_attention
from clip_train.models.layers import innermost_blocks, repeated_blocks
from clip_train.planning.activations import measure_footprint
from clip_train.planning.towers import PlannedModel

VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "options": {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
}
NOISY = VIT["options"] | {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.3}
TEXT = {"width": 64, "layers": 2, "heads": 2, "context_length": 16, "vocab_size": 500}
CLIP = {"embed_dim": 64, "image_size": 32, "vision": VIT, "text": TEXT}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 500,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {**CLIP, "quick_gelu": True},
    "noisy": {**CLIP, "vision": {**VIT, "options": NOISY, "patch_dropout": 0.5}},
    "coca": {**CLIP, "decoder": {"layers": 2, "heads": 2, "attn_pooler_queries": 5, "attn_pooler_heads": 2}},
    "siglip": {**CLIP, "text": {**TEXT, "name": "siglip", "proj": "none"}},
    "convnext": {**CLIP, "vision": {"name": "convnext_atto"}},
    "resnet": {**CLIP, "vision": {"name": "resnet18"}},
    "efficientnet": {**CLIP, "vision": {"name": "efficientnet_b0"}},
    "eva": {**CLIP, "vision": {"name": "eva02_tiny_patch14_224", "options": {"patch_size": 8, "depth": 2}}},
    "bert": {**CLIP, "text": {"name": "bert", "context_length": 16, "options": SMALL}},
    "albert": {**CLIP, "text": {"name": "albert", "context_length": 16, "options": SMALL}},  # one block, called twice
    "qwen3": {**CLIP, "text": {"name": "qwen3", "context_length": 16, "options": SMALL, "pool": "last"}},
}
# What computes attention as one operator; the others write it out where something is dropped.
WHOLE = ["vit", "coca", "siglip", "convnext", "resnet", "efficientnet", "eva", "albert", "qwen3"]


class Products(TorchDispatchMode):
    """How often each product of matrices was computed, attention's included."""

    KINDS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.overloadpacket.__name__) in self.KINDS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def build(family: str, mode: str, dtype: torch.dtype = torch.float64) -> DualEncoder:
    torch.manual_seed(0)
    return create_dual_encoder(**FAMILIES[family], grad_checkpointing=mode).to(dtype).train()


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 400, (6, 16), generator=generator)
    ids[:, 12] = 499  # CLIP's end token
    return torch.randn(6, 3, 32, 32, generator=generator).to(dtype), ids


def value(model: DualEncoder, *inputs: Tensor) -> Tensor:
    """Some number that everything the model learns has a part in."""
    outputs = [x.double() for x in model(*inputs) if x.requires_grad]
    weights = [torch.linspace(-1, 2, x.shape[-1], dtype=x.dtype) for x in outputs]
    return torch.stack([(x * weight).sum() for x, weight in zip(outputs, weights)]).sum()


def step(family: str, mode: str) -> tuple[Tensor, dict[str, Tensor], Counter[str]]:
    """A step's loss, its gradients with the buffers that it leaves, and the products of its backward."""
    model = build(family, mode)
    torch.manual_seed(2)
    loss = value(model, *batch())
    with Products() as products:
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found | dict(model.named_buffers()), products.counts


@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_is_the_same_to_the_bit_and_products_are_not_made_again(family):
    loss, gradients, products = step(family, NONE)
    assert len(gradients) > 40
    for mode in (BLOCKS, SELECTIVE):
        again, found, made = step(family, mode)
        assert torch.equal(again, loss)
        assert found.keys() == gradients.keys()
        assert [name for name in found if not torch.equal(found[name], gradients[name])] == []
        if mode == BLOCKS:
            assert made > products
        elif family in WHOLE:
            assert made == products
        else:  # attention's own
            assert set(made - products) == {"bmm"}


@pytest.mark.parametrize("mode", [BLOCKS, SELECTIVE])
def test_in_bf16_too_with_texts_in_groups(mode, monkeypatch):
    """Of one group's casts of the weights nothing is left for the next, which is another call of the same blocks."""
    monkeypatch.setattr("clip_train.models.text_lengths.CALL_COST", 1)
    pixels, ids = batch(torch.float32)
    ids[:3, 4] = 499
    found, products = [], []
    for each in (NONE, mode):
        model = build("vit", each, torch.float32)
        model.text.length_multiple = 4  # pyright: ignore[reportArgumentType]
        calls: list[Any] = []
        model.text.trunk.register_forward_pre_hook(lambda *call, calls=calls: calls.append(call))  # pyright: ignore
        with fast_attention(torch.device("cpu")):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(pixels, ids)
            assert torch.is_autocast_cache_enabled()
            loss = torch.stack([(x * torch.linspace(-1, 1, 64)).sum() for x in outputs]).sum()
            with Products() as made:
                loss.backward()
        assert len(calls) == 2
        products.append(made.counts)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert (products[1] == products[0]) == (mode == SELECTIVE)
    total = torch.stack([gradient.norm() for gradient in found[0].values()]).norm()
    for name, gradient in found[0].items():  # groups' gradients were added up in bf16, and are in fp32
        assert (found[1][name] - gradient).norm() <= 5e-3 * gradient.norm() + 1e-6 * total, name
        assert torch.equal(found[1][name], gradient) or name.startswith("text."), name


@pytest.mark.parametrize("family", ["vit", "coca", "siglip", "convnext", "resnet", "bert"])
def test_the_more_is_computed_again_the_less_is_kept(family):
    kept = {}
    for mode in MODES:
        planned = PlannedModel({**FAMILIES[family], "grad_checkpointing": mode}, precision="bf16-mixed")
        kept[mode] = measure_footprint(planned, 32).saved
    for part in set(kept[NONE]) - {"other"}:
        assert kept[BLOCKS][part] < 0.7 * kept[SELECTIVE][part]
        assert kept[SELECTIVE][part] < 0.9 * kept[NONE][part]


@pytest.mark.parametrize(("mode", "widths", "sums"), [(BLOCKS, 1, 0), (SELECTIVE, 1 + 3 + 1 + 1 + 4 + 1, 2)])
def test_a_block_keeps_its_input_and_of_its_products_each_once(mode, widths, sums):
    """In widths: input; queries, keys and values; attention; its layer; the MLP's two. And a sum for each head."""
    kept = []
    for depth in (2, 3):
        vision = {**VIT, "options": {**VIT["options"], "depth": depth}}
        planned = PlannedModel({**CLIP, "vision": vision, "grad_checkpointing": mode})
        kept.append(measure_footprint(planned, 32).saved["vision"])
    tokens = 16 + 1
    assert kept[1] - kept[0] == 32 * tokens * 4 * (widths * 64 + sums)


def test_an_attention_that_drops_is_computed_again():
    """Else the random numbers that it drew would be those of the next that draws."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    context = SelectiveCheckpointContext(is_recompute=False)
    decide, qkv = _Policy("Block"), [torch.empty(1, 1, 1, 8)] * 3
    assert decide(context, attention, *qkv) == CheckpointPolicy.MUST_SAVE
    assert decide(context, attention, *qkv, 0.0, True) == CheckpointPolicy.MUST_SAVE
    assert decide(context, attention, *qkv, 0.1) == CheckpointPolicy.PREFER_RECOMPUTE
    assert decide(context, attention, *qkv, dropout_p=0.1) == CheckpointPolicy.PREFER_RECOMPUTE


# Rows of layers in blocks, of parts in blocks, and of branches; blocks of two kinds in a row; a row of one; in no row.
@pytest.mark.parametrize(
    "name",
    ["res2net50_26w_4s", "focalnet_tiny_srf", "edgenext_xx_small", "resnest14d", "regnety_002"],
)
def test_no_more_is_kept_or_made_at_once_than_by_timms_own(name):
    config = {**CLIP, "image_size": 64, "vision": {"name": name}}
    own, kept = (PlannedModel({**config, "grad_checkpointing": mode}) for mode in (NONE, BLOCKS))
    own.model.vision.trunk.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
    expected, found = measure_footprint(own, 4), measure_footprint(kept, 4)
    assert found.saved["vision"] <= expected.saved["vision"]
    assert found.peak <= expected.peak


def test_blocks_are_not_single_layers_nor_stages():
    kinds = {}
    for name in ("mobileone_s0", "efficientvit_b0", "densenet121", "regnety_002"):
        with torch.device("meta"):
            trunk = timm.create_model(name)
        kinds[name] = Counter(type(block).__name__ for block in innermost_blocks(trunk))
    assert kinds == {
        "mobileone_s0": {"MobileOneBlock": 2 + 8 + 10 + 1 + 21},
        "efficientvit_b0": {"ResidualBlock": 1 + 2 + 2 + 1 + 1, "EfficientVitBlock": 2 + 2},
        "densenet121": {"DenseLayer": 6 + 12 + 24 + 16},
        "regnety_002": {"RegStage": 2, "Bottleneck": 4 + 7},  # the first two stages are of one block
    }


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x).mul_(2))


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.12", reason="backward finds it, not this")
def test_a_block_that_overwrites_its_products_is_refused():
    blocks = nn.Sequential(Overwriting(), Overwriting())
    x = torch.randn(3, 4, requires_grad=True)
    checkpoint_blocks(blocks, SELECTIVE)
    with pytest.raises(
        ConfigError, match=r"=selective: Overwriting computes in place \(aten.mul_.Tensor\).*give blocks"
    ):
        blocks(x)
    expected = x
    for block in blocks:
        expected = block.last(2 * block.layer(expected))  # pyright: ignore[reportCallIssue]
    assert torch.equal(blocks.eval()(x), expected)


class Dense(nn.Module):
    """Blocks that are given a list, to which each one's output is added afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Joining(width) for width in (4, 8))

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for block in self.blocks:
            found.append(block(found))
        return found[-1]


class Joining(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, parts: list[Tensor]) -> Tensor:
        return self.layers(torch.cat(parts, dim=1))


@pytest.mark.parametrize("mode", [BLOCKS, SELECTIVE])
def test_a_list_that_grows_after_a_block_has_read_it(mode):
    torch.manual_seed(0)
    model, x = Dense(), torch.randn(3, 4)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    checkpoint_blocks(model, mode)
    found = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class Remembering(nn.Module):
    """Its second call is another, as with a cache of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.layers(torch.cat(self.seen) + x)


@pytest.mark.parametrize("mode", [BLOCKS, SELECTIVE])
def test_a_block_that_cannot_be_computed_again_is_refused(mode):
    blocks = nn.Sequential(Remembering(), Remembering())
    checkpoint_blocks(blocks, mode)
    loss = blocks(torch.randn(3, 4, requires_grad=True)).sum()
    with pytest.raises(
        ConfigError, match=rf"grad_checkpointing={mode}: Remembering cannot be computed again \(.*size.*\); give none"
    ):
        loss.backward()


def test_a_block_that_computes_something_else_the_second_time_is_refused():
    class Growing(Remembering):
        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            return self.layers(torch.cat(self.seen))[: len(x)]

    blocks = nn.Sequential(Growing(), Growing())
    checkpoint_blocks(blocks, BLOCKS)
    loss = blocks(torch.randn(3, 4)).sum()
    with (
        pytest.raises(ConfigError, match=r"grad_checkpointing: a block computes something else .*; give none"),
        explained_recomputation(),
    ):
        loss.backward()


def test_the_device_being_full_is_no_fault_of_the_block():
    class Full(Remembering):
        def forward(self, x: Tensor) -> Tensor:
            if self.seen:
                raise torch.OutOfMemoryError("full")
            return super().forward(x)

    blocks = nn.Sequential(Full(), Full())
    checkpoint_blocks(blocks, BLOCKS)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        blocks(torch.randn(3, 4)).sum().backward()


def test_products_are_kept_where_torch_asks_before_it_computes():
    """As torch 2.11 does, which has no output to show."""
    context: Any = SimpleNamespace(is_recompute=False)
    assert _Policy("Block")(context, torch.ops.aten.mm.default, *[torch.eye(2)] * 2) == CheckpointPolicy.MUST_SAVE


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"grad_checkpointing=blocks: VGG has no blocks to compute again; give none"):
        create_dual_encoder(**{**CLIP, "vision": {"name": "vgg11"}}, grad_checkpointing=BLOCKS)


@pytest.mark.parametrize("mode", [BLOCKS, SELECTIVE])
def test_blocks_may_be_compiled(mode):
    _, expected, _ = step("vit", NONE)
    model = build("vit", mode)
    for tower in model.towers:
        for block in repeated_blocks(tower):
            block.compile(backend="aot_eager", fullgraph=True)
    value(model, *batch()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) > 40
    for name, gradient in found.items():  # key biases have none, but for rounding
        assert (gradient - expected[name]).norm() <= 1e-10 * (expected[name].norm() + 1), name


def test_names_of_modes():
    assert [checkpointing_mode(x) for x in (True, False, *MODES)] == [BLOCKS, NONE, *MODES]
    for other in ("all", None, 1):
        with pytest.raises(ConfigError, match=f"model.grad_checkpointing={other} is none of none, blocks, selective"):
            checkpointing_mode(other)


def test_a_copy_computes_with_its_own_weights():
    model = build("vit", SELECTIVE)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.vision.trunk.blocks.parameters():  # pyright: ignore
            parameter.zero_()
    assert torch.equal(value(other, *batch()), value(build("vit", NONE), *batch()))
