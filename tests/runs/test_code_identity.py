"""A machine with other sources than the launch had is refused."""

import pytest

from workers.code_identity import check_same_code, code_digest


@pytest.mark.shows("said-in-a-sentence")
def test_other_sources_are_refused() -> None:
    check_same_code(code_digest())
    with pytest.raises(ValueError, match=f"runs Stillhouse sources {code_digest()}.*install the"):
        check_same_code("0" * 16)
