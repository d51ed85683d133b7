"""What is left of a request for another lane does not depend on how fast its client reads."""

from __future__ import annotations

from actors.engine.requests import Request, RequestOutput, SamplingParams, TokenLogprob
from cluster.in_flight import InFlight

REQUEST = Request(
    id="client's", prompt=(1, 2), n=2, deadline_s=9.0,
    sampling=SamplingParams(max_tokens=4, prompt_logprobs=0),
)  # fmt: skip


def output(index: int, token: int, **changes: object) -> RequestOutput:
    return RequestOutput(id="7", index=index, tokens=(token,), **changes)  # type: ignore[arg-type]


def test_what_has_come_and_was_not_read_is_not_drawn_again() -> None:
    stream = InFlight(REQUEST, 0, "7", 100.0)
    stream.arrived(output(0, 11, prompt_logprobs=(TokenLogprob(1, None),)))
    stream.arrived(output(1, 21, finish_reason="stop"))
    stream.arrived(output(0, 12))
    stream.arrived(output(1, 22))  # after its end: not its own
    stream.arrived(output(5, 51))  # of no choice

    rest = stream.rest(97.0)
    assert rest.id == "7"
    assert rest.progress == ((11, 12), None)
    assert rest.deadline_s == 3.0
    assert rest.sampling.prompt_logprobs is None
    assert stream.open_choices == 1
    assert stream.outputs.qsize() == 3


async def test_a_client_is_told_all_that_came_before_it_is_done() -> None:
    stream = InFlight(REQUEST, 0, "7", None)
    for index in range(2):
        stream.arrived(output(index, 30 + index))
        stream.arrived(output(index, 40 + index, finish_reason="length"))
    assert (stream.open_choices, stream.num_untold) == (0, 2)
    told = []
    while stream.num_untold:
        told.append(await stream.next_output())
    assert [out.tokens[0] for out in told] == [30, 40, 31, 41]
    assert stream.rest(0.0).deadline_s is None
