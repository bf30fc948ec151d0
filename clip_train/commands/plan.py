"""clip-plan: what a run of clip-train will need, before it is queued."""

import sys

from omegaconf import DictConfig

from clip_train.commands.program import EXIT_DONE, run_program


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == ["calibrate"]:
        del sys.argv[1]
        run_program("clip-plan calibrate", "plan_calibrate", _calibrate)
    run_program("clip-plan", "plan", _plan, short={"resume": "resume.from"})


def _plan(cfg: DictConfig) -> int:
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig
    from rich.console import Console

    from clip_train.commands.train import choose_run_length, name_to_config
    from clip_train.planning.hardware import write_json
    from clip_train.planning.plan import as_json, make_plan
    from clip_train.planning.tables import print_plan

    choose_run_length(cfg, list(HydraConfig.get().overrides.task))
    name_to_config(cfg, "distill.model")
    plan = make_plan(cfg)
    print_plan(plan, Console())
    if plan.options.output is not None:
        write_json(as_json(plan), Path(plan.options.output), "plan.output")
        print(f"wrote {plan.options.output}")
    return EXIT_DONE


def _calibrate(cfg: DictConfig) -> int:
    from pathlib import Path

    import torch

    from clip_train.planning.hardware import measure_hardware, write_hardware

    output = Path(str(cfg.output))
    hardware = measure_hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu"), float(cfg.seconds))
    write_hardware(hardware, output)
    print(
        f"{hardware.name}: {hardware.bf16 / 1e12:.2f} TFLOP/s in bf16, {hardware.fp32 / 1e12:.2f} in fp32,"
        f" {hardware.memory / 2**30:.1f} GiB\nwrote {output}: plan.hardware={output}"
    )
    return EXIT_DONE


if __name__ == "__main__":
    main()
