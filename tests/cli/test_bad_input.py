"""One clear line, exit code 2, nothing left behind."""

import sys

import pytest

from clip_train.commands.program import quote_text
from clip_train.commands.train import main
from tests.cli.runs import TINY, clip_train
from tests.conftest import make_sample, write_shard


@pytest.fixture
def fail(tmp_path, monkeypatch, capsys):
    """Run `clip-train` with arguments that must be refused; returns the line it prints."""

    def run(*arguments: str) -> str:
        output = tmp_path / "runs"
        monkeypatch.setattr(sys, "argv", ["clip-train", *TINY, f"output_dir={output}", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("clip-train: error: ")
        assert captured.err.count("\n") == 1
        assert not output.exists()
        return captured.err

    return run


@pytest.fixture
def folder(tmp_path, make_shards):
    make_shards([4, 4])
    return tmp_path / "shards"


def test_shards_that_match_nothing(fail, folder):
    assert "no file matches" in fail(f"data.train.shards={folder}/x*.tar")


def test_one_of_many_shards_missing(fail, folder):
    assert "00002.tar does not exist" in fail(f"data.train.shards={folder}/{{00000..00005}}.tar")


def test_wrong_caption_key(fail, folder):
    line = fail(f"data.train.shards={folder}/*.tar", "data.caption_key=caption")
    assert "data.caption_key=caption" in line
    assert "found: json, png, txt" in line


def test_wrong_image_key(fail, folder):
    assert "found: json, png, txt" in fail(f"data.train.shards={folder}/*.tar", "data.image_key=tiff")


def test_wrong_json_path(fail, folder):
    assert "found: captions, nested" in fail(f"data.train.shards={folder}/*.tar", "data.caption_key=json:caption")


def test_wrong_validation_key(fail, folder):
    line = fail(f"data.train.shards={folder}/*.tar", f"data.val.shards={folder}/*.tar", "data.val.caption_key=text")
    assert "data.val.caption_key=text" in line


def test_truncated_tar(fail, folder):
    content = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(content[: len(content) // 2])
    assert "cut short" in fail(f"data.train.shards={folder}/*.tar")


def test_not_a_tar(fail, folder):
    (folder / "00001.tar").write_text("not a tar" * 100)
    assert "00001.tar is not a tar" in fail(f"data.train.shards={folder}/*.tar")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("micro_batch_size=0", "micro_batch_size=0 is not a whole number of at least 1, nor null, nor auto"),
        ("micro_batch_size=half", "micro_batch_size=half is not a whole number of at least 1, nor null, nor auto"),
        ("loss.exchange=tree", "loss.exchange=tree is none of gather, ring"),
        ("loss.matmul_dtype=int8", "loss.matmul_dtype=int8 is none of null, bfloat16, float16"),
        ("model.init_logit_scale=10", "it is the log of the scale"),
        ("model.init_logit_scale=null", "model.init_logit_scale=None is not a number"),
        ("model.init_logit_bias=-10", "loss=contrastive has no bias"),
    ],
)
def test_values_of_the_loss_and_the_micro_batch(fail, setting, message):
    assert message in fail(setting)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("optim.name=adam", "optim.name=adam is none of adamw, lion, lamb, muon, sgd"),
        ("optim.betas=[2,0.9]", "optim=adamw: Invalid beta parameter at index 0: 2"),
        ("optim.text.layer_decay=1.5", "optim.text.layer_decay=1.5 is a share: give at most 1"),
        ("optim.vision.lr=fast", "optim.vision.lr=fast is not a number of at least 0, nor null"),
        ("schedule.end_factor=2", "schedule.end_factor=2 is a share"),
        ("schedule=constant schedule.cooldown=late", "schedule.cooldown='late' is no duration"),
        ("schedule=constant schedule.cooldown_shape=line", "schedule.cooldown_shape=line is none of power, 1-sqrt"),
        ("schedule.name=rsqrt", "schedule.name=rsqrt needs cooldown: choose its file, schedule=rsqrt"),
        (
            "schedule=warm_restarts schedule.period_factor=0.5",
            "schedule.period_factor=0.5 is not a number of at least 1",
        ),
        ("ema.decay=2", "ema.decay=2 is a share"),
        ("trainer.fsdp.cpu_offload=true", "trainer.fsdp.cpu_offload=true is for trainer.strategy=fsdp"),
        (
            "trainer.strategy=fsdp trainer.ddp.bucket_cap_mb=50",
            "trainer.ddp.bucket_cap_mb=50 is for trainer",
        ),
        (
            "trainer.float8=true trainer.precision=bf16-mixed",
            "trainer.float8=true needs a GPU, not trainer.accelerator",
        ),
        ("trainer.float8=true", "trainer.float8=true goes with trainer.precision=bf16-mixed, not 32"),
        ("optim.state=4bit", "optim.state=4bit is none of fp32, bf16, 8bit"),
        ("optim=lion +optim.state=bf16", "optim.state=bf16 is for optim=adamw, not for optim=lion"),
        ("optim.state=8bit trainer.strategy=fsdp", "optim.state=8bit does not go with trainer.strategy=fsdp: take"),
        ("optim.state=bf16 trainer.precision=bf16-true", "optim.state=bf16 says nothing with trainer.precision"),
        ("trainer.compile=fast", "trainer.compile=fast is none of false, true, default, reduce-overhead, max-autotune"),
        ("trainer.compile=max-autotune", "trainer.compile=max-autotune makes CUDA graphs, which need a GPU: take true"),
        (
            "optim=muon trainer.strategy=fsdp",
            "optim=muon needs whole matrices, not trainer.strategy=fsdp: take ddp, or",
        ),
    ],
)
def test_values_of_the_optimizer_the_schedule_and_the_compiler(fail, settings, message):
    assert message in fail(*settings.split())


def test_sigmoid_loss_without_a_bias(fail):
    assert "give model.init_logit_bias a number" in fail("loss=sigmoid", "model.init_logit_bias=null")


def test_batch_norm_with_micro_batches(fail):
    vision = ("model.vision.name=resnet18", "~model.vision.options", "model.quick_gelu=false")
    for size in ("8", "auto"):
        line = fail(*vision, "data.val.shards=null", f"micro_batch_size={size}")
        assert "batch norm" in line and "micro_batch_size=null" in line


def test_batch_size_that_does_not_divide(fail):
    assert "the nearest that do: 32 or 36" in fail("batch_size=33", "trainer.devices=4")


def test_unknown_model(fail):
    assert "did you mean vit_b_32" in fail("model=vit_b_33")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optim.lrr=1", "optim.lr"),
        ("optmi.lr=1", "optim.lr"),
        ("modle=x", "model"),
        ("lr=1", "optim.lr"),
        ("optim={lrr: 1}", "optim.lr"),
    ],
)
def test_unknown_key(fail, override, hint):
    assert f"did you mean {hint}" in fail(override)


def test_two_lengths(fail):
    assert "max_steps and max_epochs are both given" in fail("max_steps=2", "max_epochs=3")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("batch_size=0", "batch_size=0"),
        ("batch_size=many", "batch_size=many"),
        ("max_steps=0", "max_steps=0"),
        ("trainer.precision=64", "bf16-mixed"),
        ("trainer.devices=0", "trainer.devices=0"),
        ("trainer.hardware=h1000", "trainer.hardware=h1000 is unknown; did you mean h100?"),
        ("optim.warmup=soon", "optim.warmup='soon'"),
        ("data.num_workers=-1", "data.num_workers=-1"),
        ("data=shards", "data.train.shards"),
        ("resume=/no/such.ckpt", "resume=/no/such.ckpt"),
        ("optim.lr=[1,", "viable"),
        ("optim.lr=fast", "optim.lr=fast"),
        ("seed=-1", "seed=-1"),
        ("data.lanes=0", "data.lanes=0"),
        ("data.decode=slow", "data.decode=slow is none of fast, exact"),
        ("data.word_dropout=1.5", "data.word_dropout=1.5"),
        ("data.long_captions=cut", "truncate, random_crop, sentence"),
        ("data.train.weights=[1,2]", "one weight for each"),
        ("data.caption_key=[txt,txt]", "data.caption_key has 2 entries"),
        ("data.cache_size=much", "data.cache_size=much"),
        ("data.augmentation.scale=0.5", "data.augmentation.scale=0.5 is not 2 number(s)"),
        ("data.augmentation.ratio=[0,1]", "data.augmentation.ratio=[0, 1]"),
        ("data.augmentation.color_jitter=[0.4]", "data.augmentation.color_jitter=[0.4]"),
        ("data.augmentation.randaugment={num_ops: 2}", "randaugment={'num_ops': 2}"),
        ("data.train.weights=3", "data.train.weights=3 is not a list"),
        ("trainer.num_nodes=0", "trainer.num_nodes=0"),
        ("trainer.accelerator=abacus", "auto, cpu, gpu"),
        ("checkpoint.keep=-1", "checkpoint.keep=-1"),
        ("eval.batch_size=0", "eval.batch_size=0"),
        ("model.text.heads=5", "heads=5"),
        ("model.text.context_length=1", "model.text.context_length=1"),
        ("data.train.shards=/tmp/{a", "nbalanced"),
        ("max_samples=many", "max_samples=many"),
    ],
)
def test_values_that_cannot_be(fail, override, named):
    assert named in fail(override)


def test_a_checkpoint_that_is_none(fail, tmp_path):
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    assert "is no valid checkpoint of clip-train: it is no folder" in fail(f"resume={tmp_path / 'junk.ckpt'}")
    assert "it has no manifest.json" in fail(f"resume={tmp_path}")


def test_an_incomplete_validation_set(fail, tmp_path):
    shard = write_shard(tmp_path / "val.tar", [make_sample(0), {k: v for k, v in make_sample(1).items() if k != "txt"}])
    assert "1 samples lack an image or a caption" in fail(f"data.val.shards={shard}")


def test_a_cache_that_is_too_small(fail, tmp_path):
    shard = write_shard(tmp_path / "0.tar", [make_sample(0)])
    line = fail(f"data.train.shards='pipe:cat {shard}'", f"data.cache_dir={tmp_path}/cache", "data.cache_size=1KB")
    assert "over the limit data.cache_size=1 KB: raise that" in line


def test_output_that_cannot_be_written(fail, tmp_path):
    (tmp_path / "file").touch()
    assert "choose another output_dir" in fail(f"output_dir={tmp_path}/file/runs")


def test_too_many_bad_samples_end_the_run_on_all_ranks(tmp_path):
    samples = [make_sample(i) | ({"png": b"broken"} if i % 5 == 0 else {}) for i in range(600)]
    shard = write_shard(tmp_path / "bad.tar", samples)
    arguments = [f"data.train.shards={shard}", "data.max_bad_fraction=0.1", "max_epochs=9"]
    done = clip_train(*TINY, *arguments, f"output_dir={tmp_path}", "run_name=run", ranks=2)
    assert done.returncode == 2
    assert "more than data.max_bad_fraction=0.1; first:" in done.stderr
    assert "image_unreadable)" in done.stderr and f" in {shard}" in done.stderr


def test_braces_need_no_quotes():
    assert quote_text("a.b=x/{0..3}.tar") == "a.b='x/{0..3}.tar'"
    for argument in ("a=1", "a=[1,2]", "a={x: 1}", "a='x'", "a=1,2", "--cfg", "a=b::c/*.tar", "a=[1,"):
        assert quote_text(argument) == argument
