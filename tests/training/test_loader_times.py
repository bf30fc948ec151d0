from clip_train.training.loader_times import LoaderTimes

SECONDS = {"read": 0.1, "decode": 0.6, "augment": 0.2, "tokenize": 0.1}


def test_milliseconds_per_sample():
    times = LoaderTimes(num_workers=1, cpus=2, decode="fast")
    times.add(SECONDS, samples=100)
    times.add(SECONDS, samples=100)
    assert times.metrics() == {"data/read_ms": 1, "data/decode_ms": 6, "data/augment_ms": 2, "data/tokenize_ms": 1}
    times.forget()
    assert all(spent == 0 for spent in times.metrics().values())


def test_a_hint_names_the_slow_stage_and_the_setting():
    for workers, decode, remedy in ((1, "exact", "raise data.num_workers (1, of 2 processors)"),):
        times = LoaderTimes(workers, 2, decode)
        times.add(SECONDS, samples=10)
        assert times.hint(0.09) is None
        hint = times.hint(0.34)
        assert hint == f"34% of the time goes into waiting for data, 60% of it decoding pictures: {remedy}"
        assert times.hint(0.34) is None  # said once


def test_where_processors_are_used_up_the_hint_is_another():
    for decode, remedy in (("exact", "set data.decode=fast"), ("fast", "clip-shards make image_size=")):
        times = LoaderTimes(2, 2, decode)
        times.add(SECONDS, samples=10)
        assert remedy in (times.hint(0.5) or "")
    times = LoaderTimes(2, 2, "fast")
    times.add({**SECONDS, "read": 2.0}, samples=10)
    assert "reading shards: keep the shards on a faster disk" in (times.hint(0.5) or "")
