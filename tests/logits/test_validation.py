"""Every message of the logits room."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft

X = np.zeros((2, 3), "float32")
Y = np.zeros(2, int)
CALLS = [
    (jaxsoft.softmax, (X.astype(int),), {}, TypeError, "`logits` must have a floating"),
    (
        jaxsoft.softmax,
        (X,),
        {"temperature": True},
        TypeError,
        "`temperature` must be a real number",
    ),
    (
        jaxsoft.softmax,
        (X,),
        {"temperature": jnp.int32(1)},
        TypeError,
        "`temperature` must have a fl",
    ),
    (
        jaxsoft.softmax,
        (X,),
        {"temperature": -1.0},
        ValueError,
        "not be negative or NaN, got -1.0",
    ),
    (
        jaxsoft.softmax,
        (X,),
        {"temperature": float("nan")},
        ValueError,
        "not be negative or NaN",
    ),
    (
        jaxsoft.softmax,
        (X,),
        {"temperature": jnp.asarray([[1.0], [-2.0]])},
        ValueError,
        "got -2.0",
    ),
    (
        jaxsoft.softmax,
        (X,),
        {"temperature": np.ones(3, "f")},
        ValueError,
        "class axis must have si",
    ),
    (
        jaxsoft.softmax,
        (X,),
        {"temperature": np.ones((5, 1), "f")},
        ValueError,
        "must broadcast to",
    ),
    (jaxsoft.softmax, (X,), {"axis": 2}, ValueError, "`axis` must name one of the 2"),
    (jaxsoft.softmax, (X,), {"axis": 1.0}, TypeError, "`axis` must be an int"),
    (jaxsoft.softmax, (X[:, :0],), {}, ValueError, "must have at least one class"),
    (jaxsoft.softmax, (X,), {"where": Y}, TypeError, "`where` must have dtype bool"),
    (
        jaxsoft.softmax,
        (X,),
        {"where": np.ones((3, 3), bool)},
        ValueError,
        r"`where` must broadcast to \(2, 3\)",
    ),
    (
        jaxsoft.softmax,
        (X,),
        {"implementation": "cuda"},
        ValueError,
        "`implementation` must be None or one of",
    ),
    (
        jaxsoft.softmax,
        (X,),
        {"implementation": "reference"},
        NotImplementedError,
        "must be 'xla' or 'mosaic_tpu' or 'mosaic_gpu' for softmax, got 'reference'",
    ),
    (jaxsoft.softmax_cross_entropy, (X,), {}, ValueError, "not both be given, nor bo"),
    (
        jaxsoft.softmax_cross_entropy,
        (X, Y),
        {"targets": X},
        ValueError,
        "not both be given",
    ),
    (jaxsoft.softmax_cross_entropy, (X, X), {}, TypeError, "`labels` must have an int"),
    (
        jaxsoft.softmax_cross_entropy,
        (X, np.zeros(3, int)),
        {},
        ValueError,
        r"`labels` must have shape .* \(2,\), got \(3,\)",
    ),
    (
        jaxsoft.softmax_cross_entropy,
        (X,),
        {"targets": X[:1]},
        ValueError,
        "`targets` must have shape",
    ),
    (
        jaxsoft.softmax_cross_entropy,
        (X, Y),
        {"label_smoothing": 1.5},
        ValueError,
        r"`label_smoothing` must lie in \[0, 1\], got 1.5",
    ),
    (
        jaxsoft.softmax_cross_entropy,
        (X, Y),
        {"z_loss": -1},
        ValueError,
        "`z_loss` must be finite, >= 0, got -1",
    ),
    (
        jaxsoft.softmax_cross_entropy,
        (X, Y),
        {"z_loss": "a"},
        TypeError,
        "`z_loss` must be a Python number",
    ),
    (
        jaxsoft.distillation_loss,
        (X, X[:1]),
        {},
        ValueError,
        "`teacher_logits` must have shape",
    ),
    (
        jaxsoft.distillation_loss,
        (X, X),
        {"divergence": "kl"},
        ValueError,
        "`divergence` must be one of 'forward_kl'",
    ),
    (
        jaxsoft.distillation_loss,
        (X, X),
        {"divergence": "jensen_shannon", "beta": 1.5},
        ValueError,
        r"`beta` must lie in \[0, 1\], got 1.5",
    ),
    (
        jaxsoft.distillation_loss,
        (X, X),
        {"beta": 0.1},
        ValueError,
        "`beta` must be 0.5 with 'forward_kl', got 0.1",
    ),
    (
        jaxsoft.distillation_loss,
        (X, X),
        {"divergence": "jensen_shannon", "alpha": 0.1},
        ValueError,
        "`alpha` must be 0 with 'jensen_shannon', got 0.1",
    ),
    (
        jaxsoft.distillation_loss,
        (X, X),
        {"alpha": 1},
        ValueError,
        "`alpha` must be less than 1",
    ),
]


@pytest.mark.parametrize("function, args, options, kind, message", CALLS)
def test_messages(function, args, options, kind, message):
    with pytest.raises(kind, match=message):
        function(*args, **options)


@pytest.mark.parametrize("name", ["log_softmax", "logsumexp", "entropy"])
def test_all_functions_share_the_checks(name):
    with pytest.raises(ValueError, match="must not be negative"):
        getattr(jaxsoft, name)(X, temperature=-0.5)
    with pytest.raises(NotImplementedError, match=name):
        getattr(jaxsoft, name)(X, implementation="mosaic_tpu")


def test_a_second_position_is_no_temperature():
    """In `jax.nn` it is the axis: `softmax(x, 0)` must not give one-hot rows here."""
    for function in (
        jaxsoft.softmax,
        jaxsoft.log_softmax,
        jaxsoft.logsumexp,
        jaxsoft.entropy,
    ):
        with pytest.raises(TypeError, match="positional argument"):
            function(X, 0)  # pyright: ignore[reportCallIssue]
