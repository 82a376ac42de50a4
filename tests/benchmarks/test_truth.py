"""The truth agrees with the definition, written out, and with its differences."""

import math

import numpy as np
import pytest

from benchmarks import checks, truth


class TestTruth:
    """The truth agrees with the definition, written out, and its differences."""

    def problem(self):
        random = np.random.default_rng(0)
        hidden = random.normal(size=(5, 3))
        kernel = random.normal(size=(3, 7))
        labels = np.array([0, 6, 2, 2, 1])
        kept = np.array([1, 1, 1, 0, 1, 0, 1], bool)
        options = truth.LinearOptions(
            bias=random.normal(size=7),
            temperature=random.uniform(0.5, 2, size=5),
            logit_softcap=1.5,
            class_mask=kept,
            label_smoothing=0.2,
            z_loss=0.01,
            weights=random.uniform(size=5),
            ignore_label=1,
        )
        return hidden, kernel, labels, options

    def mean(self, hidden, kernel, labels, options):
        """The mean loss, one token and one class at a time."""
        total = weight_sum = 0.0
        classes = [v for v in range(7) if options.class_mask[v]]
        for n, label in enumerate(labels):
            if label == options.ignore_label:
                continue
            scaled = {}
            for v in classes:
                logit = sum(hidden[n, h] * kernel[h, v] for h in range(3))
                logit += options.bias[v]
                cap = options.logit_softcap
                scaled[v] = cap * math.tanh(logit / cap) / options.temperature[n]
            lse = math.log(sum(math.exp(z) for z in scaled.values()))
            smoothing = options.label_smoothing
            loss = lse - (1 - smoothing) * scaled[label]
            loss -= smoothing * sum(scaled.values()) / len(classes)
            loss += options.z_loss * lse**2
            total += options.weights[n] * loss
            weight_sum += options.weights[n]
        return total / weight_sum

    def test_mean(self):
        hidden, kernel, labels, options = self.problem()
        subset = checks.Subset.of(5, 7)
        found = truth.linear_truth(hidden, kernel, labels, subset, options=options)
        expected = self.mean(hidden, kernel, labels, options)
        assert found["mean"] == pytest.approx(expected, rel=1e-12)
        assert found["loss"][-1] == 0

    @pytest.mark.parametrize("block_bytes", [1, 2 * 8 * 7, 2**28])
    def test_gradients_are_central_differences(self, monkeypatch, block_bytes):
        monkeypatch.setattr(truth, "_BLOCK_BYTES", block_bytes)
        hidden, kernel, labels, options = self.problem()
        subset = checks.Subset.of(5, 7)
        found = truth.linear_truth(hidden, kernel, labels, subset, options=options)
        for name, array in (("dhidden", hidden), ("dkernel", kernel)):
            for index in np.ndindex(array.shape):
                step = np.zeros(array.shape)
                step[index] = 1e-5
                moved = []
                for sign in (1, -1):
                    changed = {"dhidden": hidden, "dkernel": kernel}
                    changed[name] = array + sign * step
                    mean = self.mean(
                        changed["dhidden"], changed["dkernel"], labels, options
                    )
                    moved.append(mean)
                slope = (moved[0] - moved[1]) / 2e-5
                assert found[name][index] == pytest.approx(slope, abs=1e-9)

    def test_cotangent_of_each_token(self):
        hidden, kernel, labels, _ = self.problem()
        subset = checks.Subset.of(5, 7)
        weights = np.array([0.5, 0.0, -1.0, 2.0, 0.25])
        whole = truth.linear_truth(hidden, kernel, labels, subset, cotangent=weights)
        parts = [
            weight
            * truth.linear_truth(
                hidden[n : n + 1], kernel, labels[n : n + 1], checks.Subset.of(1, 7)
            )["dkernel"]
            for n, weight in enumerate(weights)
        ]
        np.testing.assert_allclose(whole["dkernel"], sum(parts), rtol=1e-12)

    def test_softmax_family(self):
        random = np.random.default_rng(1)
        logits, cotangent = random.normal(size=(2, 3, 5))
        labels, temperature = np.array([4, 0, 2]), np.array([[0.5], [1.0], [3.0]])

        def value(name, logits, temperature):
            exps = np.exp(logits / temperature)
            probs = exps / exps.sum(-1, keepdims=True)
            if name == "softmax":
                return (probs * cotangent).sum()
            if name == "log_softmax":
                return (np.log(probs) * cotangent).sum()
            return -np.log(probs[np.arange(3), labels]).sum()

        found = truth.softmax_truth(logits, labels, temperature, cotangent)
        assert (found["softmax"] * cotangent).sum() == pytest.approx(
            value("softmax", logits, temperature)
        )
        assert found["cross_entropy"].sum() == pytest.approx(
            value("cross_entropy", logits, temperature)
        )
        for name in ("softmax", "log_softmax", "cross_entropy"):
            for index in np.ndindex(logits.shape):
                step = np.zeros(logits.shape)
                step[index] = 1e-5
                above = value(name, logits + step, temperature)
                below = value(name, logits - step, temperature)
                slope = (above - below) / 2e-5
                assert found["d" + name][index] == pytest.approx(slope, abs=1e-8)
        step = np.array([[0.0], [1e-5], [0.0]])
        above = value("softmax", logits, temperature + step)
        below = value("softmax", logits, temperature - step)
        slope = (above - below) / 2e-5
        assert found["dtemperature"][1, 0] == pytest.approx(slope, abs=1e-8)
