"""Layers to test on, and the losses of a layer in float64 NumPy-style JAX."""

import jax
import jax.numpy as jnp
import numpy as np

# What logits of `layer` are like.
KINDS = ("unit", "zero", "peaked", "offset", "negative")
# Options that a loss can take, each of which touches another part of the backward.
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "mask": {"class_mask": True},
    "softcap": {"logit_softcap": 0.7},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "temperature": {"temperature": 0.6},
    "row_temperature": {"temperature": True},
    "weights": {"weights": True},
}


def layer(rows, features, classes, kind="unit", dtype="float32", seed=0):
    """Returns hidden, kernel and labels whose logits are one of `KINDS`."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((rows, features))
    kernel = rng.standard_normal((features, classes)) / np.sqrt(features)
    labels = rng.integers(0, classes, rows)
    labels[: min(rows, 2)] = [0, classes - 1][: min(rows, 2)]
    if kind == "zero":
        kernel *= 0
    elif kind == "peaked":
        kernel *= 20
    elif kind == "offset":
        hidden[:, 0], kernel[0] = 1024.0, 16.0
    elif kind == "negative":
        hidden[:, 0], kernel[0] = 1.0, -20.0
        hidden[:, 1:] *= 1e-3
    return (
        jnp.asarray(hidden, dtype),
        jnp.asarray(kernel, dtype),
        jnp.asarray(labels),
    )


def arrays(options, rows, classes, labels, dtype="float32"):
    """Replaces True in options by arrays."""
    rng = np.random.default_rng(9)
    result = dict(options)
    if result.get("bias") is True:
        result["bias"] = jnp.asarray(rng.standard_normal(classes), dtype)
    if result.get("class_mask") is True:
        mask = rng.uniform(size=classes) < 0.7
        mask[np.asarray(labels)] = True
        result["class_mask"] = jnp.asarray(mask)
    if result.get("temperature") is True:
        result["temperature"] = jnp.asarray(rng.uniform(0.3, 2, rows), "float32")
    if result.get("weights") is True:
        weights = rng.uniform(0.1, 2, rows)
        weights[3::4] = 0
        result["weights"] = jnp.asarray(weights, "float32")
    return result


def plain_loss(
    hidden,
    kernel,
    labels,
    *,
    bias=None,
    temperature=1.0,
    logit_softcap=None,
    class_mask=None,
    label_smoothing=0.0,
    z_loss=0.0,
    weights=None,
):
    """The loss of each token by the plain formula, in the dtype of the arguments."""
    u = jnp.matmul(hidden, kernel)
    dtype = u.dtype if u.dtype == "float64" else jnp.dtype("float32")
    u = u.astype(dtype)
    if bias is not None:
        u = u + bias.astype(dtype)[None]
    if logit_softcap is not None:
        u = logit_softcap * jnp.tanh(u / logit_softcap)
    tau = jnp.broadcast_to(jnp.asarray(temperature).astype(dtype), labels.shape)
    u = u / tau[:, None]
    keep = jnp.ones(u.shape[1], bool) if class_mask is None else class_mask
    masked = jnp.where(keep[None], u, -1e30)
    log_p = jax.nn.log_softmax(masked)
    lse = jax.nn.logsumexp(masked, axis=-1)
    picked = jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0]
    mean = jnp.sum(jnp.where(keep[None], log_p, 0), 1) / jnp.sum(keep).astype(dtype)
    loss = -(1 - label_smoothing) * picked - label_smoothing * mean
    if not (isinstance(z_loss, float) and z_loss == 0):
        loss = loss + z_loss * lse**2
    if weights is None:
        return loss
    # What a token of weight 0 would lose counts for nothing, in its weight too.
    return jnp.where(weights == 0, 0, weights.astype(dtype) * loss)
