"""Compiled blocks against the same blocks as they are: features, gradients, names, and how often they are compiled."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._logging._internal import trace_log
from torch.fx.experimental import _config as shape_config
from torch.torch_version import TorchVersion

from clip_train.errors import ConfigError
from clip_train.losses import contrastive_loss
from clip_train.models import compiling, create_dual_encoder, text_lengths
from clip_train.models.compiling import compile_blocks, compile_mode
from clip_train.models.cpu_attention import fast_attention
from clip_train.models.layers import innermost_blocks
from clip_train.training.cached_gradients import cached_backward
from tests.models.configs import load_config

CONTEXT = 32


def has_compiler() -> bool:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler here")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before, and torch's settings afterwards as they were."""
    torch._dynamo.reset()
    counters.clear()
    config, shapes = torch._dynamo.config, cast(Any, shape_config)
    with (
        config.patch(optimize_ddp=config.optimize_ddp, recompile_limit=config.recompile_limit),
        shapes.patch(use_duck_shape=shapes.use_duck_shape),
        pytest.MonkeyPatch.context() as patch,
    ):
        # pytest would keep what torch traces, which takes longer than the rest.
        patch.setattr(trace_log, "handlers", [])
        yield
    torch._dynamo.reset()


def small_model(layers: int = 2, dropout: float = 0.0, grad_checkpointing: bool = False) -> Any:
    torch.manual_seed(0)
    vision: dict[str, Any] = {"patch_size": 16, "embed_dim": 32, "depth": layers, "num_heads": 2}
    text = {"width": 32, "layers": layers, "heads": 2, "context_length": CONTEXT, "length_multiple": 4}
    return create_dual_encoder(
        embed_dim=24,
        image_size=32,
        quick_gelu=True,
        grad_checkpointing=grad_checkpointing,
        vision={"name": "vit_tiny_patch16_224", "options": {**vision, "proj_drop_rate": dropout}},
        text={**text, "vocab_size": 100},
    )


def batch(count: int, seed: int, lengths: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Pictures, and captions of all lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 98, (count, CONTEXT), generator=generator)
    ends = torch.tensor(lengths) - 1 if lengths else torch.randint(1, CONTEXT, (count,), generator=generator)
    ids[torch.arange(count), ends] = 99
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator), ids


def step(model: Any, inputs: tuple[Tensor, Tensor], micro_batch_size: int | None = None) -> tuple[Tensor, list[Tensor]]:
    """The loss and all gradients."""
    model.zero_grad()
    scalars = model.logit_parameters()
    if micro_batch_size is None:
        loss = contrastive_loss(*model(*inputs), **scalars)
        loss.backward()
    else:
        how: dict[str, Any] = {"micro_batch_size": micro_batch_size, "backward": lambda scalar, last: scalar.backward()}
        loss = cached_backward(model, contrastive_loss, scalars, inputs, **how)
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def graphs() -> int:
    """Compiled so far."""
    return counters["stats"]["unique_graphs"]


def assert_close(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], tolerance: float) -> None:
    assert found[0].item() == pytest.approx(expected[0].item(), rel=tolerance)
    total = torch.stack([grad.norm() for grad in expected[1]]).norm()
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one - other).norm() <= tolerance * other.norm() + 1e-3 * tolerance * total


def test_steps_are_those_of_eager_blocks(monkeypatch):
    """Whole batches and micro-batches, with their dropout; as blocks are traced, before C++ is made of that."""
    monkeypatch.setattr(text_lengths, "CALL_COST", 0)
    compiled, eager = small_model(dropout=0.2), small_model(dropout=0.2)
    compile_blocks(compiled, backend="aot_eager")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (compiled, eager)]
    for number, (count, size) in enumerate([(12, None), (12, 5), (9, None), (10, 4)]):
        results = []
        for model, optimizer in zip((compiled, eager), optimizers):
            torch.manual_seed(number)
            results.append(step(model, batch(count, number), size))
            optimizer.step()
        assert_close(*results, tolerance=2e-5)
    assert graphs() == 4 and not counters["graph_break"]


@needs_compiler
@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.15", reason="torch mixes dtypes in attention's float64 backward"
)
@pytest.mark.parametrize("name", ["text", "vision"])
def test_made_of_cpp_in_float64(monkeypatch, name):
    """By the compiler itself: that takes seconds for a block, whatever its size."""
    monkeypatch.setattr(text_lengths, "CALL_COST", 0)
    pixels, ids = batch(8, 0)
    inputs = ids if name == "text" else pixels.double() / 255
    found = []
    for compiled in (True, False):
        tower = getattr(small_model(), name).double()
        if compiled:
            compile_blocks(nn.ModuleDict({name: tower}))
        features = tower(inputs)
        features.sin().sum().backward()
        found.append((features.detach().sum(), [p.grad for p in tower.parameters()]))
    assert graphs() == 1
    assert_close(*found, tolerance=1e-12)


@needs_compiler
@pytest.mark.slow
def test_a_step_in_bf16_made_of_cpp_is_the_eager_one_to_rounding(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    compiled, eager = small_model(), small_model()
    compile_blocks(compiled)
    assert_near(bf16_step(compiled), bf16_step(eager))
    assert graphs() == 2


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_gpu_steps_of_compiled_blocks_are_those_of_eager_ones(mode):
    """CUDA graphs are recorded in the second step, and replayed from the third on."""
    compiled, eager = small_model().cuda(), small_model().cuda()
    compile_blocks(compiled, mode)
    for number in range(4):
        pixels, ids = batch(8, number)
        assert_close(*(step(model, (pixels.cuda(), ids)) for model in (compiled, eager)), tolerance=1e-3)


@pytest.mark.parametrize(("micro_batch_size", "grad_checkpointing"), [(None, False), (5, True)])
def test_nothing_is_compiled_after_the_first_steps(monkeypatch, micro_batch_size, grad_checkpointing):
    """Captions of all lengths, alone or in groups of any size; and evaluation is compiled once, for batches of any."""
    monkeypatch.setattr(text_lengths, "CALL_COST", 0)
    model = small_model(layers=3, grad_checkpointing=grad_checkpointing)
    compile_blocks(model, backend="aot_eager")
    lengths = [None, None, [3] * 16, [3] * 15 + [32], [32] * 15 + [2], [5, 9] * 8, *[None] * 6]
    seen = []
    for number, chosen in enumerate(lengths):
        step(model, batch(16, number, chosen), micro_batch_size)
        seen.append(graphs())
    modes = 1 if micro_batch_size is None else 3  # without gradients, with them, and the last pair alone
    assert seen == [2 * modes] * len(lengths)  # one kind of block in each tower, however many there are
    model.eval()
    with torch.no_grad():
        for number, count in enumerate((20, 7, 16)):
            model(*batch(count, number))
            seen.append(graphs())
    model.train()
    step(model, batch(16, 99), micro_batch_size)
    assert set(seen[len(lengths) :]) == {graphs()} and graphs() <= seen[0] + 2


def test_no_text_goes_alone(monkeypatch):
    monkeypatch.setattr(text_lengths, "CALL_COST", 0)
    model = small_model()
    expected = model.text
    shapes: list[tuple[int, ...]] = []
    expected.trunk.register_forward_pre_hook(
        lambda _, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    ids = batch(7, 0, [3, 6, 7, 10, 10, 20, 32])[1]
    with monkeypatch.context() as patch:
        patch.setattr(text_lengths, "_LEAST_GROUP", 1)
        alone = model.text(ids)
    assert shapes == [(1, 4), (2, 8), (2, 12), (1, 20), (1, 32)]
    shapes.clear()
    assert (model.text(ids) - alone).abs().max() < 1e-5
    assert shapes == [(3, 8), (2, 12), (2, 32)]
    shapes.clear()
    model.text(ids[:1])
    assert shapes == [(1, 4)]


def test_attention_of_bf16_on_a_processor_is_compiled_with_its_own_backward(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    compiled, eager = small_model(), small_model()
    compile_blocks(compiled, backend="aot_eager")
    own = torch.ops.clip_train.cpu_attention_backward.default.name()
    calls, results = [], []
    for model in (compiled, eager):
        bf16_step(model)  # which compiles
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            results.append(bf16_step(model))
        calls.append(sum(event.count for event in profile.key_averages() if event.key == own))
    assert calls[0] == calls[1] > 0
    assert_near(*results)


def assert_near(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    """As near as steps in bf16 are, which rounds other sums otherwise."""
    assert found[0].item() == pytest.approx(expected[0].item(), rel=0.01)
    total = torch.stack([grad.norm() for grad in expected[1]]).norm()
    difference = torch.stack([(one - other).norm() for one, other in zip(found[1], expected[1])]).norm()
    assert difference < 0.03 * total


def bf16_step(model: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss and all gradients, as a training step has them on a processor."""
    model.zero_grad()
    with fast_attention(torch.device("cpu")):
        with torch.autocast("cpu", torch.bfloat16):
            loss = contrastive_loss(*model(*batch(8, 0)), **model.logit_parameters())
        loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def test_names_stay():
    model = small_model()
    names = list(model.state_dict())
    compile_blocks(model, backend="aot_eager")
    step(model, batch(4, 0))
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in small_model().named_parameters()]


def test_a_convolutional_network_is_compiled_by_its_inner_blocks():
    with torch.device("meta"):
        model = create_dual_encoder(**load_config("rn50"))
    kinds = [type(block).__name__ for block in innermost_blocks(model.vision)]
    assert kinds == ["BottleneckBlock"] * (3 + 4 + 6 + 3)


def test_graphs_are_for_the_image_tower(monkeypatch):
    """CUDA graphs, which cannot be run here: who would get them, with which of torch's options."""
    made: list[tuple[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: made.append((type(self).__name__, how["options"])))
    compile_blocks(small_model(), "max-autotune")
    graphs = {name: options.get("triton.cudagraphs", False) for name, options in made}
    assert graphs == {"Block": True, "CLIPEncoderLayer": False}
    assert all(options["max_autotune"] and options["fallback_random"] for _, options in made)


def test_what_the_switch_may_say(monkeypatch):
    assert [compile_mode(choice) for choice in (False, True, "max-autotune")] == [None, "default", "max-autotune"]
    with pytest.raises(ConfigError, match=r"trainer\.compile=fast is none of false, true, default, reduce-overhead"):
        compile_mode("fast")

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with pytest.raises(ConfigError, match=r"trainer\.compile=true needs a C\+\+ compiler"):
        compiling.check_compiler("trainer.compile=true", "give trainer.compile=false")
