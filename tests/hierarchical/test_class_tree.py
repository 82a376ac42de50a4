"""Trees lead every class to a place of its own, and waste no row."""

import heapq
import json
import pickle
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import ClassTree
from jaxsoft.hierarchical.huffman import code_lengths, least_depth
from jaxsoft.hierarchical.levels import Levels
from tests.hierarchical import cases

# Ids of trees of all sizes fill one shape, for which operations are compiled once.
PLACES = 100


def padded(class_ids):
    """Returns ids with ids behind them that are no class."""
    return np.pad(class_ids, (0, PLACES - len(class_ids)), constant_values=-1)


def all_depths(tree):
    """Returns the depths of all classes."""
    ids = padded(np.arange(tree.num_classes, dtype=np.int32))
    return np.asarray(tree.depths(ids))[: tree.num_classes]


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("num_classes", [*range(1, 14), 27, 40, 97])
def test_paths_are_a_tree(kind, num_classes):
    tree = cases.tree(kind, num_classes)
    assert tree.num_classes == num_classes and tree.num_rows == num_classes - 1
    ids = padded(np.arange(num_classes, dtype=np.int32))
    fields = [np.asarray(field) for field in tree.paths(ids)]
    assert {field.shape for field in fields} == {(PLACES, tree.max_depth)}
    assert not fields[1][num_classes:].any()
    first, number, choice = (field[:num_classes] for field in fields)
    for field, walked in zip(fields, cases.paths(tree), strict=True):
        np.testing.assert_array_equal(field[:num_classes], walked)
    assert number.max(initial=0) <= tree.arity - 1
    inside = number > 0
    # From the root down, without a gap.
    assert (np.diff(inside.astype(int), axis=1) <= 0).all()
    assert ((choice >= 0) & (choice <= number)).all()
    if num_classes > 1:
        assert (first[:, 0] == 0).all() and inside[:, -1].any()
    # Every row belongs to one node, every place to one class.
    nodes = {(f, n) for f, n in zip(first[inside], number[inside], strict=True)}
    rows = sorted(row for f, n in nodes for row in range(f, f + n))
    assert rows == [*range(num_classes - 1)]
    steps = np.where(inside, first * (tree.arity + 1) + choice, -1)
    assert len(np.unique(steps, axis=0)) == num_classes
    shares = np.prod(np.where(inside, 1 / (number + 1), 1), axis=1)
    assert shares.sum() == pytest.approx(1)
    assert (all_depths(tree) == inside.sum(1)).all()
    # Along the leaves from left to right, the nodes of a level are in order.
    order = np.arange(num_classes) if tree.order is None else np.asarray(tree.order)
    for depth in range(tree.max_depth):
        along = first[order, depth][inside[order, depth]]
        assert (np.diff(along) >= 0).all()


@pytest.mark.parametrize("kind", cases.KINDS)
def test_ids_that_are_no_class_have_no_path(kind):
    tree = cases.tree(kind, 20)
    ids = jnp.array([[-1, 20], [-100, 2**31 - 1]])
    assert not np.asarray(tree.paths(ids).num_rows).any()
    assert tree.depths(ids).shape == (2, 2)


@pytest.mark.parametrize("arity", [2, 3, 8])
@pytest.mark.parametrize("num_classes", [1, 2, 3, 64, 65, 1000, 100_003, 10_000_000])
def test_balanced_tree_is_as_shallow_as_can_be(arity, num_classes):
    tree = ClassTree.balanced(num_classes, arity)
    depth = least_depth(num_classes, arity)
    assert tree.max_depth == depth and arity**depth >= num_classes
    assert depth == 0 or arity ** (depth - 1) < num_classes
    assert jax.tree.leaves(tree) == []
    some = np.unique(np.linspace(0, num_classes - 1, 50).astype(np.int32))
    depths = np.asarray(tree.depths(padded(some)))[: len(some)]
    assert set(depths) <= {depth, depth - 1} and (np.diff(depths) >= 0).all()


def huffman_cost(counts, arity):
    heap = [0.0] * (-(len(counts) - 1) % (arity - 1)) + sorted(map(float, counts))
    cost = 0.0
    while len(heap) > 1:
        total = sum(heapq.heappop(heap) for _ in range(arity))
        heapq.heappush(heap, total)
        cost += total
    return cost


COUNTS = {
    "zipf": lambda n: 1e6 / np.arange(1, n + 1),
    "flat": lambda n: np.full(n, 7),
    "fibonacci": lambda n: 1.618 ** np.arange(n),
    "unsorted": lambda n: np.random.default_rng(0).integers(1, 99, n),
}


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("arity", [2, 3, 5])
@pytest.mark.parametrize("num_classes", [2, 3, 4, 7, 20, 61])
def test_huffman_has_the_least_expected_depth(kind, arity, num_classes):
    counts = COUNTS[kind](num_classes)
    tree = ClassTree.huffman(counts, arity, max_depth=num_classes)
    depths = all_depths(tree)
    assert (depths * counts).sum() == pytest.approx(huffman_cost(counts, arity))


@pytest.mark.parametrize("arity", [2, 3])
@pytest.mark.parametrize("kind", COUNTS)
def test_huffman_depth_is_bounded(kind, arity):
    counts = COUNTS[kind](60)
    least = least_depth(60, arity)
    assert ClassTree.huffman(counts, arity).max_depth <= least + 4
    costs = []
    for bound in range(least, least + 5):
        tree = ClassTree.huffman(counts, arity, max_depth=bound)
        depths = all_depths(tree)
        assert depths.max() == tree.max_depth <= bound
        costs.append((depths * counts).sum())
    assert (np.diff(costs) <= 1e-9 * costs[0]).all()


def test_best_lengths_under_a_bound_by_enumeration():
    weights = np.array([1.0, 1, 2, 5, 13])

    def lengths(left, number):
        if number == 0:
            return [()] if left == 0 else []
        return [
            (length, *rest)
            for length in range(1, 4)
            if left >= 2 ** (3 - length)
            for rest in lengths(left - 2 ** (3 - length), number - 1)
        ]

    best = min(np.dot(found, weights) for found in lengths(8, 5))
    assert code_lengths(weights, 2, 3) @ weights == best


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [5, 0, 0, 0], [0], [3], [1e300] * 3])
def test_counts_of_any_kind(counts):
    tree = ClassTree.huffman(counts)
    assert tree.num_classes == len(counts)
    depths = all_depths(tree)
    assert depths[0] == depths.min()


def test_similar_classes_share_paths():
    random = np.random.default_rng(0)
    centres = np.repeat(10 * random.standard_normal((4, 8)), 16, axis=0)
    groups = np.repeat(np.arange(4), 16)
    shuffled = random.permutation(64)
    embeddings = (centres + random.standard_normal((64, 8)))[shuffled]
    ids = padded(np.arange(64, dtype=np.int32))
    choices = np.asarray(ClassTree.clustered(embeddings).paths(ids).choices)[:64]
    # The two topmost choices are those of the group.
    top = choices[:, 0] * 2 + choices[:, 1]
    pairs = set(zip(top.tolist(), groups[shuffled].tolist(), strict=True))
    assert len(pairs) == 4


def test_many_clusters_at_once():
    embeddings = np.random.default_rng(0).standard_normal((3000, 2))
    tree = ClassTree.clustered(embeddings)
    order = np.asarray(tree.order)
    assert sorted(order) == [*range(3000)]
    # Leaves side by side are nearer than any two.
    near = np.linalg.norm(np.diff(embeddings[order], axis=0), axis=1).mean()
    far = np.linalg.norm(np.diff(embeddings, axis=0), axis=1).mean()
    assert near < far / 8
    assert (order == np.asarray(ClassTree.clustered(embeddings).order)).all()


@pytest.mark.parametrize("scale", [2.0**-110, 2.0**110])
def test_clusters_do_not_depend_on_scale(scale):
    embeddings = np.random.default_rng(0).standard_normal((600, 3)).astype("float32")
    order = ClassTree.clustered(embeddings).order
    scaled = ClassTree.clustered(embeddings * np.float32(scale)).order
    np.testing.assert_array_equal(order, scaled)


def test_taxonomy():
    names = [("animal", "cat"), ("animal", "dog"), ("animal", "emu"), ("plant",)]
    tree = ClassTree.from_paths(names)
    assert (tree.max_depth, tree.arity, tree.num_rows) == (2, 3, 3)
    assert all_depths(tree).tolist() == [2, 2, 2, 1]
    narrow = ClassTree.from_paths(names, arity=2)
    assert (narrow.max_depth, narrow.arity, narrow.num_rows) == (3, 2, 3)


@pytest.mark.parametrize("arity", [None, 2])
def test_classes_that_are_inner_nodes(arity):
    lines = ["Animals > Live", "Animals > Pets > Birds", "Animals", "Apparel"]
    lines += [
        "Animals > Pets",
        "Apparel > Shoes > Boots",
        "Animals > Pets > Birds > Toys",
    ]
    paths = [tuple(line.split(" > ")) for line in lines]
    inner = {path[:i] for path in paths for i in range(1, len(path))}
    # A branch of its own, by hand.
    own = [(*path, None) if path in inner else path for path in paths]
    found, expected = (ClassTree.from_paths(p, arity) for p in (paths, own))
    # Lines of text are split, whatever space is around their names.
    of_text = ClassTree.from_paths([f" {x.replace(' ', '')} " for x in lines], arity)
    assert found.num_classes == len(lines)
    for tree in (of_text, expected):
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        for a, b in zip(*map(jax.tree.leaves, (found, tree)), strict=True):
            np.testing.assert_array_equal(a, b)
    if arity is None:
        assert all_depths(found).tolist() == [2, 4, 2, 2, 3, 2, 4]


def test_a_million_classes():
    tree = ClassTree.huffman(1 / np.arange(1, 10**6 + 1))
    depths = np.asarray(tree.depths(padded(np.array([0, 10**6 - 1], np.int32))))
    assert tree.num_rows == 10**6 - 1
    assert depths[0] < 6 and 20 < depths[1] <= tree.max_depth <= 24


@pytest.mark.parametrize("kind", ["canonical", "tables"])
def test_files_whose_tables_do_not_fit_are_refused(tmp_path, kind):
    """A table with one entry or the sign changed, or cut, and other levels."""
    paths = [(0,), (1, 0), (1, 1, 0), (1, 1, 1), (2,), (3, 0), (3, 1)]
    tree = ClassTree.huffman([5, 1, 1, 2, 9, 1, 1])
    tree = tree if kind == "canonical" else ClassTree.from_paths(paths)
    tree.save(tmp_path / "tree")
    with np.load(tmp_path / "tree") as file:
        arrays = {name: file[name] for name in file.files}
    form = json.loads(str(arrays.pop("form")))
    files = []
    for name, table in arrays.items():
        for place in range(len(table)):
            for value in (table[place] + 1, table[place] - 1, -9, 2**30):
                other = table.copy()
                other[place] = value
                files.append((form, {**arrays, name: other}))
        for other in (-table, table[1:], table.astype(np.int64), table[None]):
            files.append((form, {**arrays, name: other}))
        files.append((form, {each: arrays[each] for each in arrays if each != name}))
    for name in form:
        for value in (None, "x", [], -1, 0, 1, 10**9, [1], [-1, 8], [0] * 2000 + [7]):
            files.append(({**form, name: value}, arrays))
    for other, tables in files:
        with (tmp_path / "other").open("wb") as file:
            np.savez(file, form=np.array(json.dumps(other)), **tables)
        with pytest.raises(ValueError, match="holds no tree that fits"):
            ClassTree.load(tmp_path / "other")


def test_slow_work_tells_how_far_it_is():
    shares = []
    embeddings = np.random.default_rng(0).standard_normal((64, 3))
    ClassTree.clustered(embeddings, progress=shares.append)
    assert len(shares) > 3 and shares == sorted(shares)
    assert shares[0] > 0 and shares[-1] == 1


@pytest.mark.parametrize("kind", cases.KINDS)
def test_saved_pickled_and_passed_as_an_argument(tmp_path, kind):
    tree = cases.tree(kind, 23)
    tree.save(tmp_path / "tree")
    ids = jnp.arange(23)
    for other in (
        ClassTree.load(tmp_path / "tree"),
        pickle.loads(pickle.dumps(tree)),
        jax.tree.map(jnp.asarray, tree),
    ):
        found = jax.jit(ClassTree.paths)(other, ids)
        for field, walked in zip(found, cases.paths(tree), strict=True):
            np.testing.assert_array_equal(field, walked)


@pytest.mark.parametrize(
    ("error", "make", "message"),
    [
        (ValueError, lambda: ClassTree.balanced(0), "`num_classes` must be at least 1"),
        (
            TypeError,
            lambda: ClassTree.balanced(cast(Any, 2.0)),
            "`num_classes` must be an int",
        ),
        (ValueError, lambda: ClassTree.balanced(2**30), "`num_classes` must be below"),
        (ValueError, lambda: ClassTree.balanced(4, 1), "`arity` must be at least 2"),
        (ValueError, lambda: ClassTree.huffman([]), "`counts` must have shape"),
        (ValueError, lambda: ClassTree.huffman([1, -1]), "`counts` must be finite"),
        (
            ValueError,
            lambda: ClassTree.huffman([1] * 9, max_depth=3),
            "`max_depth` must be at least 4 for 9 classes",
        ),
        (
            ValueError,
            lambda: ClassTree.clustered(np.zeros(3)),
            "`embeddings` must have shape",
        ),
        (
            ValueError,
            lambda: ClassTree.clustered([[np.nan], [0]]),
            "`embeddings` must be finite",
        ),
        (ValueError, lambda: ClassTree.from_paths([]), "`paths` must have at least"),
        (
            ValueError,
            lambda: ClassTree.from_paths([("a", "b"), ("a",), ("a",)]),
            "got ('a',) for class 2, where class 1 is already",
        ),
        (
            TypeError,
            lambda: ClassTree.from_paths([("a",), b"b > c"]),
            "such as 'tree > oak' or ('tree', 'oak'), got b'b > c' for class 1",
        ),
        (
            TypeError,
            lambda: ClassTree.from_paths([1, 2]),  # pyright: ignore
            "such as 'tree > oak' or ('tree', 'oak'), got 1 for class 0",
        ),
        (
            TypeError,
            lambda: ClassTree.from_paths([("a",), ["b", ["c"]]]),  # pyright: ignore
            "hashed, such as strings, got ['b', ['c']] for class 1",
        ),
        (
            TypeError,
            lambda: ClassTree.from_paths(5),  # pyright: ignore
            "`paths` must be a path for each class, got 5",
        ),
        (
            ValueError,
            lambda: ClassTree.from_paths(["a > b", "a > > c"]),
            "`paths` must have a name on both sides of every '>', got 'a > > c' for",
        ),
        (
            ValueError,
            lambda: ClassTree.from_paths(["00", "01", "1"]),
            "`paths` must have a '>' where all are strings, got '00' first",
        ),
        (
            ValueError,
            lambda: ClassTree.from_paths(["a > b", ("a", "b")]),
            "got ('a', 'b') for class 1, where class 0 is already",
        ),
        (
            ValueError,
            lambda: ClassTree.from_paths([("a",), ("a",)]),
            "where class 0 is already",
        ),
        (
            TypeError,
            lambda: ClassTree.balanced(4).paths(jnp.ones(2)),
            "`class_ids` must have an integer dtype",
        ),
    ],
)
def test_errors(error, make, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("num_classes", [1, 2, 97])
def test_biases_give_the_classes_their_probabilities(kind, num_classes):
    tree = cases.tree(kind, num_classes)
    weights = np.random.default_rng(3).uniform(0.01, 5, num_classes) ** 3
    bias = tree.biases(weights)
    assert bias.shape == (tree.num_rows,) and bias.dtype == np.float32
    layer = np.zeros((1, 3)), np.ones((tree.num_rows, 3)), bias
    (log_probs,) = cases.log_probs(tree, *layer)
    np.testing.assert_allclose(log_probs, np.log(weights / weights.sum()), atol=2e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"`probabilities` must have shape \(2,\), got \(1,\)."),
        ([1.0, 0.0], "must be finite and positive, got 0.0."),
        ([1.0, np.nan], "must be finite and positive, got nan."),
        ([1.0, np.inf], "must be finite and positive, got inf."),
    ],
)
def test_biases_messages(weights, message):
    with pytest.raises(ValueError, match=message):
        ClassTree.balanced(2).biases(weights)


@pytest.mark.parametrize("arity", [2, 3, 4])
def test_steps_by_quotients_are_those_from_node_to_node(arity):
    counts = 1.5 ** np.arange(40)
    for tree in (
        *(ClassTree.balanced(classes, arity) for classes in (2, 5, 40, 81)),
        ClassTree.huffman(counts, arity),
        # Too deep for places in the complete tree to be int32.
        ClassTree.huffman(2.0 ** np.arange(40), arity, max_depth=39),
    ):
        levels = tree.levels
        slots = levels.slot_of_rank(jnp.arange(levels.num_classes, dtype=jnp.int32))
        depths = levels.level_of_slot(slots)
        expected = Levels.steps_to(levels, slots, depths)
        for own, other in zip(levels.steps_to(slots, depths), expected, strict=True):
            np.testing.assert_array_equal(own, other)
