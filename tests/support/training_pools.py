"""Random pools of training devices, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from placement.training import TrainingCosts


@st.composite
def pools(draw: st.DrawFn, max_layers: int = 6) -> TrainingCosts:
    num_devices, num_layers = draw(st.integers(1, 4)), draw(st.integers(1, max_layers))
    seconds = st.integers(1, 40).map(lambda eighths: eighths / 8)
    some = st.integers(0, 200)

    def rows(values: st.SearchStrategy[float]) -> tuple[tuple[float, ...], ...]:
        return draw(st.tuples(*[st.tuples(*[values] * num_layers)] * num_devices))

    def each(values: st.SearchStrategy[int], count: int) -> tuple[int, ...]:
        return draw(st.tuples(*[values] * count))

    return TrainingCosts(
        device_ids=tuple(draw(st.permutations([f"d{i}" for i in range(num_devices)]))),
        nodes=tuple(f"n{draw(st.integers(0, 2))}" for _ in range(num_devices)),
        forward_s=rows(seconds),
        recompute_s=rows(seconds),
        backward_s=rows(seconds),
        weight_upload_s=rows(st.integers(0, 8).map(lambda eighths: eighths / 8)),
        head_upload_s=draw(
            st.tuples(*[st.integers(0, 8).map(lambda eighths: eighths / 8)] * num_devices)
        ),
        head_forward_s=draw(st.tuples(*[seconds] * num_devices)),
        head_backward_s=draw(st.tuples(*[seconds] * num_devices)),
        hand_off_s=tuple(
            tuple(0.0 if a == b else draw(st.integers(0, 16)) / 8 for b in range(num_devices))
            for a in range(num_devices)
        ),
        layer_weight_bytes=each(some, num_layers),
        layer_gradient_bytes=each(some, num_layers),
        head_weight_bytes=draw(some),
        head_gradient_bytes=draw(some),
        layer_activation_bytes=each(some, num_layers),
        boundary_bytes=draw(st.integers(0, 10)),
        memory_bytes=each(st.integers(0, 3000), num_devices),
    )
