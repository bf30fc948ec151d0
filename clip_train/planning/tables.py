"""A plan for people: tables, what they assume, and what to mind."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from clip_train.planning.hardware import CPU
from clip_train.planning.plan import Plan, Variant
from clip_train.planning.timing import LATENCY

_LEAST_WIDTH = 160  # characters
_GIB, _GIGA, _DASH = 2**30, 1e9, "–"


def print_plan(plan: Plan, console: Console) -> None:
    """All of it."""
    console.width = max(console.width, _LEAST_WIDTH)  # in a file, or a narrow terminal, figures would be cut off
    job, clock = plan.chosen.job, plan.clock
    console.print(
        f"{plan.model_name}: {clock.total_samples:,} pairs, {clock.total_samples // clock.batch_size:,} steps of"
        f" {job.batch_size:,}, on {job.world_size} x {plan.hardware.name} in {job.num_nodes} node(s),"
        f" {plan.precision}, {job.strategy}, {plan.optimizer}",
        soft_wrap=True,
    )
    for table in (_model(plan), _memory(plan), _step(plan), _alternatives(plan), _scaling(plan)):
        console.print(table)
    for line in _assumptions(plan):
        console.print(f"- {line}", soft_wrap=True, highlight=False)
    for note in plan.notes:
        console.print(f"NOTE: {note}", soft_wrap=True, style="bold")


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _model(plan: Plan) -> Table:
    rows = []
    for part in dict.fromkeys((*plan.parameters, *plan.flops.forward)):
        whole, typical = (flops.forward.get(part, 0) / _GIGA for flops in (plan.flops, plan.typical_flops))
        rows.append((part, f"{plan.parameters.get(part, 0):,}", f"{whole:,.2f}", f"{typical:,.2f}"))
    totals = [flops.forward_total / _GIGA for flops in (plan.flops, plan.typical_flops)]
    rows.append(("all", f"{sum(plan.parameters.values()):,}", *(f"{total:,.2f}" for total in totals)))
    trains = [flops.training / _GIGA for flops in (plan.flops, plan.typical_flops)]
    rows.append(("training", f"{plan.learning_parameters:,}", *(f"{train:,.2f}" for train in trains)))
    columns = [f"GFLOP/pair, {tokens} tokens" for tokens in (plan.context_length, plan.typical_tokens)]
    return _table("Model", ("part", "parameters", *columns), rows)


def _memory(plan: Plan) -> Table:
    memory, job = plan.chosen.memory, plan.chosen.job
    rows = [
        ("weights", _gib(memory.weights)),
        ("gradients", _gib(memory.gradients)),
        (f"{plan.optimizer}'s state", _gib(memory.optimizer)),
        ("average of the weights", _gib(memory.average)),
        ("batch", _gib(memory.batch)),
    ]
    for name in dict.fromkeys(part for saved in plan.activations.values() for part in saved or ()):
        each = [_DASH if saved is None else _gib(saved[name]) for saved in plan.activations.values()]
        rows.append((f"activations, {name}: {' / '.join(plan.activations)}", " / ".join(each)))
    rows += [
        ("in passing, in backward", _gib(memory.passing)),
        (f"loss, {job.loss} by {job.exchange}", _gib(memory.loss)),
        ("fullest moment", _gib(memory.peak)),
        ("of", _gib(plan.hardware.memory * plan.options.usable_memory)),
        ("", "fits" if plan.chosen.fits else "DOES NOT FIT"),
        ("largest micro-batch that fits", _DASH if plan.largest is None else f"{plan.largest:,}"),
    ]
    at_once = f"{job.at_once:,} of {job.local_batch:,} pairs at once"
    return _table(f"Memory of a GPU, {at_once}, checkpointing {plan.chosen.checkpointing}", ("", "GiB"), rows)


def _step(plan: Plan) -> Table:
    step, traffic = plan.chosen.step, plan.chosen.traffic
    rows = [
        ("towers", f"{step.towers:.3f}", _DASH),
        ("loss", f"{step.loss:.3f}", _DASH),
        ("features and their gradients", f"{step.loss_exchange:.3f}", f"{traffic.loss:,.0f}"),
        ("gradients and weights, not hidden", f"{step.gradient_exchange:.3f}", ""),
        ("  gradients", "", f"{traffic.gradients:,.0f}"),
        ("  weights", "", f"{traffic.weights:,.0f}"),
        ("what ranks agree on, gradient's norm", _DASH, f"{traffic.numbers:,.0f}"),
        *([("shards from the host, gradients to it", f"{step.host:.3f}", "")] if plan.chosen.job.offload else []),
        ("step", f"{step.total:.3f}", f"{traffic.total:,.0f}"),
        ("pairs/s", f"{plan.chosen.pairs_per_second:,.0f}", ""),
        ("days", f"{plan.chosen.days:,.2f}", ""),
        ("GPU-hours", f"{plan.chosen.gpu_hours:,.0f}", ""),
    ]
    if plan.chosen.cost is not None:
        rows.append(("cost", f"{plan.chosen.cost:,.0f}", ""))
    node = plan.cores * plan.chosen.job.devices
    rows.append(("cores for pictures, per GPU / node", f"{plan.cores:.1f} / {node:.0f}", ""))
    return _table("Step", ("", "seconds", "bytes sent per GPU"), rows)


def _alternatives(plan: Plan) -> Table:
    header = ("GPUs", "strategy", "checkpointing", "micro-batch")
    header += ("GiB", "s/step", "pairs/s", "days", "GPU-hours", "cost")
    rows = [
        (
            str(variant.job.world_size),
            variant.job.strategy,
            variant.checkpointing,
            f"{variant.job.at_once:,} of {variant.job.local_batch:,}",
            *_figures(variant),
            _cost(variant),
        )
        for variant in plan.alternatives
    ]
    return _table("Alternatives, each with the largest micro-batch that fits", header, rows)


def _scaling(plan: Plan) -> Table:
    header = ("GPUs", "pairs each", "at once", "efficiency", "exchange")
    header += ("GiB", "s/step", "pairs/s", "days", "GPU-hours", "cost", "cores each")
    first = next((variant for variant in plan.scaling.values() if variant is not None), None)
    rows = [
        (f"{gpus:,}", *_scaled(plan, variant, first))
        if variant is not None and first is not None
        else (f"{gpus:,}", "does not fit", *[_DASH] * (len(header) - 2))
        for gpus, variant in plan.scaling.items()
    ]
    return _table(f"The same batch of {plan.chosen.job.batch_size:,} on other numbers of GPUs", header, rows)


def _scaled(plan: Plan, variant: Variant, first: Variant) -> tuple[str, ...]:
    each, alone = (way.pairs_per_second / way.job.world_size for way in (variant, first))
    exchanged = variant.step.loss_exchange + variant.step.gradient_exchange + variant.step.host
    return (
        f"{variant.job.local_batch:,}",
        f"{variant.job.at_once:,}",
        f"{each / alone:.0%}",
        f"{exchanged / variant.step.total:.0%}",
        *_figures(variant),
        _cost(variant),
        f"{each / plan.options.images_per_core:.1f}",
    )


def _figures(variant: Variant) -> tuple[str, ...]:
    return (
        _gib(variant.memory.peak),
        f"{variant.step.total:.3f}",
        f"{variant.pairs_per_second:,.0f}",
        f"{variant.days:,.2f}",
        f"{variant.gpu_hours:,.0f}",
    )


def _cost(variant: Variant) -> str:
    return _DASH if variant.cost is None else f"{variant.cost:,.0f}"


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}"


def _assumptions(plan: Plan) -> list[str]:
    options, hardware = plan.options, plan.hardware
    network = hardware.network / _GIGA if options.network is None else options.network
    loss_rate = hardware.fp32 if plan.chosen.job.matmul_bytes == 4 else hardware.bf16
    return [
        f"{hardware.rate(plan.precision) / 1e12:,.1f} TFLOP/s in {plan.precision}, {loss_rate / 1e12:,.1f} in the loss"
        f": a step reaches {options.efficiency:.0%} (plan.efficiency)",
        f"{hardware.link / _GIGA:,.0f} GB/s per GPU inside a node, {network:,.1f} between nodes, of which collectives"
        f" reach {options.link_efficiency:.0%} (plan.link_efficiency)",
        "collectives go around rings, so that all ranks send equally much; each message of the loss takes"
        f" {LATENCY * 1e6:.0f} us",
        f"gradients hide behind {options.overlap:.0%} of the last backward (plan.overlap), features behind nothing",
        "left out: ranks that wait for slower ones, and the optimizer's arithmetic",
        f"memory is that of texts of {plan.context_length} tokens, the whole context; time of {plan.typical_tokens},"
        f" as the tower takes captions of {options.caption_tokens} (plan.caption_tokens)",
        *_of_settings(plan),
        f"of {hardware.memory / _GIB:.1f} GiB a step may take {options.usable_memory:.0%} (plan.usable_memory)",
        f"a core decodes {options.images_per_core:,.0f} images/s (plan.images_per_core)",
        "efficiency is pairs per second and GPU beside the first row's; micro-batches but one go forward twice",
    ]


def _of_settings(plan: Plan) -> list[str]:
    """Of `trainer.float8` and `trainer.fsdp.cpu_offload`."""
    hardware, flops, lines = plan.hardware, plan.typical_flops, []
    if flops.float8 and hardware.float8 is not None:
        lines.append(
            f"{hardware.float8 / 1e12:,.1f} TFLOP/s in float8, for {flops.float8 / flops.forward_total:.0%} of forward"
            " and as much of backward; scaling costs nothing, and memory is that of bf16"
        )
    if plan.chosen.job.offload and hardware.device != CPU:
        lines.append(
            f"{hardware.host / _GIGA:,.0f} GB/s to the host and from it, hidden behind nothing; the processor's"
            f" {plan.optimizer} is left out"
        )
    return lines
