import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def pool():
    """Four ranks; a case may use the first few of them."""
    pool = RankPool(4)
    yield pool
    pool.close()
