from clip_train.training.instruments.loader_times import LoaderTimes

SECONDS = {"read": 0.1, "decode": 0.6, "augment": 0.2, "tokenize": 0.1}


def test_milliseconds_per_sample():
    times = LoaderTimes(num_workers=1, cpus=2, decode="fast")
    times.add(SECONDS, samples=100)
    times.add(SECONDS, samples=100)
    assert times.metrics() == {"data/read_ms": 1, "data/decode_ms": 6, "data/augment_ms": 2, "data/tokenize_ms": 1}
    times.forget()
    assert all(spent == 0 for spent in times.metrics().values())


def test_advice_names_the_slow_stage_and_the_setting():
    times = LoaderTimes(1, 2, "exact")
    assert times.advice() is None
    times.add(SECONDS, samples=10)
    assert times.advice() == "raise data.num_workers (1, of 2 processors), as 60% of loading is decoding pictures"


def test_where_processors_are_used_up_the_advice_is_another():
    for decode, remedy in (("exact", "set data.decode=fast"), ("fast", "store smaller pictures (clip-shards make")):
        times = LoaderTimes(2, 2, decode)
        times.add(SECONDS, samples=10)
        assert (times.advice() or "").startswith(remedy)
    times = LoaderTimes(2, 2, "fast")
    times.add({**SECONDS, "read": 2.0}, samples=10)
    assert (times.advice() or "").startswith("keep the shards on a faster disk")
    assert "of loading is reading shards" in (times.advice() or "")
