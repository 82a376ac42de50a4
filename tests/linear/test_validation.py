"""Every message of the linear room."""

import numpy as np
import pytest

import jaxsoft

H, W, Y = np.zeros((2, 3), "f"), np.zeros((3, 5), "f"), np.zeros(2, int)
CALLS = [
    ((H.astype(int), W, Y), {}, TypeError, "`hidden` must have a floating-point"),
    ((H, W.astype(int), Y), {}, TypeError, "`kernel` must have a floating-point"),
    ((H, W, H), {}, TypeError, "`labels` must have an integer dtype"),
    ((H, W, Y[:1]), {}, ValueError, r"`labels` must have shape hidden.shape\[:-1\]"),
    ((H, W.T, Y), {}, ValueError, r"`kernel` must have shape \[H, V\] with H = 3"),
    ((H, W, Y), {"kernel_layout": "vh"}, ValueError, r"must have shape \[V, H\]"),
    ((H, W, Y), {"kernel_layout": "ab"}, ValueError, "`kernel_layout` must be one of"),
    ((H, W[:, :0], Y), {}, ValueError, "`kernel` must have a class"),
    (
        (H, W, Y),
        {"bias": np.zeros(4, "f")},
        ValueError,
        r"`bias` must have shape \[V\]",
    ),
    ((H, W, Y), {"bias": np.zeros(5, int)}, TypeError, "`bias` must have a floating"),
    ((H, W, Y), {"class_mask": np.ones(5)}, TypeError, "`class_mask` must have dtype"),
    ((H, W, Y), {"class_mask": np.ones(4, bool)}, ValueError, "`class_mask` must have"),
    ((H, W, Y), {"logit_softcap": 0}, ValueError, "`logit_softcap` must be positive"),
    ((H, W, Y), {"logit_softcap": -1.0}, ValueError, "`logit_softcap` must be finite"),
    ((H, W, Y), {"temperature": -1}, ValueError, "`temperature` must not be negative"),
    (
        (H, W, Y),
        {"temperature": np.ones((3, 1), "f")},
        ValueError,
        "`temperature` must have shape",
    ),
    (
        (H, W, Y),
        {"workspace_bytes": 0},
        ValueError,
        "`workspace_bytes` must be at least 1",
    ),
    (
        (H, W, Y),
        {"workspace_bytes": 1.5},
        TypeError,
        "`workspace_bytes` must be an int",
    ),
    ((H, W, Y), {"vocab_axis": "v"}, ValueError, "`vocab_axis` must name axes of an"),
    (
        (H, W, Y),
        {"token_axes": ("d",)},
        ValueError,
        "`token_axes` must name axes of an",
    ),
    (
        (H, W, Y),
        {"implementation": "mosaic_gpu"},
        NotImplementedError,
        "must both be bfloat16 or both float16 for implementation",
    ),
]
LOSS_CALLS = [
    ({"reduction": "avg"}, ValueError, "`reduction` must be one of"),
    ({"label_smoothing": -0.1}, ValueError, "`label_smoothing` must lie in"),
    ({"z_loss": float("inf")}, ValueError, "`z_loss` must be finite"),
    ({"weights": np.ones(3, "f")}, ValueError, "`weights` must have shape"),
    ({"weights": np.ones(2, int)}, TypeError, "`weights` must have a floating"),
    ({"ignore_label": 1.0}, TypeError, "`ignore_label` must be an int"),
]


@pytest.mark.parametrize("name", ["linear_statistics", "linear_cross_entropy"])
@pytest.mark.parametrize("args, options, kind, message", CALLS)
def test_shared_messages(name, args, options, kind, message):
    with pytest.raises(kind, match=message):
        getattr(jaxsoft, name)(*args, **options)


@pytest.mark.parametrize("options, kind, message", LOSS_CALLS)
def test_messages_of_the_loss(options, kind, message):
    with pytest.raises(kind, match=message):
        jaxsoft.linear_cross_entropy(H, W, Y, **options)


def test_hidden_must_have_features():
    with pytest.raises(ValueError, match=r"`hidden` must have shape \[..., H\]"):
        jaxsoft.linear_statistics(np.float32(1), W)
