"""openhelix.runtime.launch.parts: another host's clock, read over RPC."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openhelix.runtime.launch import parts
from openhelix.runtime.launch.parts import OFFSET_ROUNDS, clock_offset_s

S = 10**9


@given(
    offset_ns=st.integers(-(10**6) * S, 10**6 * S),
    ways=st.lists(
        st.tuples(*[st.integers(0, S // 10)] * 3), min_size=OFFSET_ROUNDS, max_size=OFFSET_ROUNDS
    ),
)
def test_the_truth_is_within_the_uncertainty(offset_ns, ways):
    now_ns = 10**15
    left = list(ways)

    def call(method, timeout_s):
        nonlocal now_ns
        assert method == "time"
        there, work, back = left.pop()
        now_ns += there
        received_ns = now_ns + offset_ns
        now_ns += work
        answer = {"t_received_ns": received_ns, "t_sent_ns": now_ns + offset_ns}
        now_ns += back
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.time, "monotonic_ns", lambda: now_ns)
        found = clock_offset_s(call)
    assert not left
    assert abs(found["offset"] - offset_ns * 1e-9) <= found["uncertainty"] + 1e-6
    quickest_ns = min(there + back for there, _, back in ways)
    assert found["uncertainty"] == pytest.approx(quickest_ns / 2 * 1e-9, abs=1e-9)


def test_an_answer_without_times_is_an_error_and_no_offset():
    with pytest.raises(KeyError):
        clock_offset_s(lambda *_, **__: {"t_received_ns": 1})
