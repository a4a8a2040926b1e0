"""Who is in an image: columns, patterns and folders; nobody in two parts or two shards; what is refused by
name."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image

from memcontrol.commands.audit import audit
from memcontrol.config.load import load_config
from memcontrol.config.methods import RedistributionConfig
from memcontrol.core.errors import MemControlError
from memcontrol.data.look import summarize_folder
from memcontrol.data.split import dump_parts, load_parts, parse_parts
from memcontrol.reading.groups import join_rows
from memcontrol.training.shards import deal_images, exchange_images

PARTS = ("train", "holdout", "test")


def write(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(cells).resize((40, 40), Image.Resampling.BICUBIC).save(path)


def load(path, seed=0, **keys):
    return load_parts(load_config({"name": "a", "data": {"path": str(path), **keys}}).data, 32, seed).parts


def refused(words, path, **keys):
    with pytest.raises(MemControlError, match=words) as caught:
        load(path, **keys)
    assert "\n" not in str(caught.value)


def fill_pool(root, n_people=15, n_each=4):
    for i in range(n_people * n_each):
        write(root / f"p{i // n_each:02}_{i % n_each}.png", i)
    return root


def name_person(record):
    return record.name.rpartition("/")[2][:3]


def fill_by_pattern(root):
    fill_pool(root)
    return r"(p\d+)_"


def fill_by_column(root):
    fill_pool(root)
    rows = [{"file_name": f"p{p:02}_{i}.png", "text": "x", "patient": p} for p in range(15) for i in range(4)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "patient"


def fill_by_folder(root):
    for i in range(60):
        write(root / f"p{i // 4:02}" / f"p{i // 4:02}_{i}.png", i)
    return "folder"


@pytest.mark.parametrize("fill", [fill_by_pattern, fill_by_column, fill_by_folder])
@pytest.mark.parametrize("seed", [0, 1])
def test_nobody_is_in_two_parts_and_a_share_cuts_one_group_at_most(fill, seed, tmp_path):
    rule = fill(tmp_path)
    parts = load(tmp_path, seed, group=rule)
    assert sum(map(len, parts.values())) == 60
    homes = {(name_person(record), part) for part, images in parts.items() for record in images.records}
    assert len(homes) == 15
    for images in parts.values():
        people = list(map(name_person, images.records))
        assert len(set(images.groups)) == len(set(people)) == len(set(zip(images.groups, people)))
        runs = [p for p, before in zip(people, [None, *people]) if p != before]
        assert len(runs) == len(set(people))
    stored = {"source": str(tmp_path), "resolution": 32, "parts": dump_parts(parts)}
    assert parse_parts(json.loads(json.dumps(stored))) == parts


def test_without_a_group_the_split_and_what_is_stored_are_as_before(tmp_path):
    """The split of before: a permutation of the different images, dealt until each part is full."""
    from memcontrol.core.seeds import derive_seed

    fill_pool(tmp_path)
    order = np.random.default_rng(derive_seed(3, "split")).permutation(60)
    names = sorted(path.name for path in tmp_path.iterdir())
    parts = load(tmp_path, 3)
    found = [record.name for images in parts.values() for record in images.records]
    assert found == [names[i] for i in order]
    rows = [row for rows in dump_parts(parts).values() for row in rows]
    assert all(row.keys() == {"name", "caption", "digest"} for row in rows)
    assert len({group for images in parts.values() for group in images.groups}) == 60


@pytest.mark.parametrize("rule", [r"(p\d+)_", "folder"])
def test_parts_that_share_a_group_are_refused_by_name(rule, tmp_path):
    for number, part in enumerate(PARTS):
        for i in range(20):
            write(tmp_path / part / f"p{number}{i}" / f"p{number}{i}_x.png", 100 * number + i)
    parts = load(tmp_path, group=r"(p\d+)_")
    assert [len(images) for images in parts.values()] == [20, 20, 20]
    write(tmp_path / "holdout" / "p03" / "p03_y.png", 999)
    refused(
        "train and holdout share group 'p03': 'train/p03/p03_x.png' and 'holdout/p03", tmp_path, group=rule
    )


def test_what_names_no_group_is_refused_by_name(tmp_path):
    fill_by_column(tmp_path)
    write(tmp_path / "lonely.png", 777)
    refused("does not match image 'lonely.png'", tmp_path, group=r"(p\d+)_")
    refused("image 'lonely.png' has none in the metadata", tmp_path, group="patient")
    refused("no column of the metadata, which has file_name, text, patient", tmp_path, group="person")
    refused("'lonely.png' lies in no folder of its own", tmp_path / ".", group="folder")
    refused("is '.p', which is no regular expression", tmp_path, group="(p")
    refused("is '..:p.', which has no group in parentheses", tmp_path, group="(?:p)")


def test_joined_items_by_brute_force():
    for seed in range(20):
        random = np.random.default_rng(seed)
        pairs = [tuple(map(int, random.integers(0, 30, 2))) for _ in range(20)]
        reached = np.eye(30, dtype=int)
        for i, j in pairs:
            reached[i, j] = reached[j, i] = 1
        reached = np.linalg.matrix_power(reached, 30) > 0
        assert join_rows(30, pairs) == reached.argmax(1).tolist()


GROUPS = torch.tensor([g for g in range(40) for _ in range(1 + g % 5)])
CLASSES = torch.arange(len(GROUPS)) % 3


@pytest.mark.parametrize("split", ("random", "balanced", "contiguous", "similar"))
@pytest.mark.parametrize("n_shards", (1, 2, 3, 8))
def test_a_group_is_dealt_to_one_shard_and_sizes_are_nearly_even(split, n_shards):
    points = torch.randn(len(GROUPS), 6, generator=torch.Generator().manual_seed(0))
    shards = deal_images(split, n_shards, CLASSES, points, 7, GROUPS)
    assert sorted(torch.cat(shards).tolist()) == list(range(len(GROUPS)))
    owners = Counter(int(group) for rows in shards for group in GROUPS[rows].unique())
    assert set(owners.values()) == {1}
    most = {"random": 1, "balanced": 5}.get(split, 10)
    assert max(map(len, shards)) - min(map(len, shards)) <= most
    again = deal_images(split, n_shards, CLASSES, points, 7, GROUPS)
    assert all(map(torch.equal, shards, again))


@pytest.mark.parametrize("split", ("random", "balanced", "contiguous", "similar"))
def test_one_huge_group_leaves_no_shard_empty(split):
    groups = torch.tensor([0] * 50 + [1, 2, 3, 4])
    points = torch.randn(54, 3, generator=torch.Generator().manual_seed(0))
    for n_shards in range(1, 6):
        assert min(map(len, deal_images(split, n_shards, torch.zeros(54).long(), points, 0, groups))) > 0


def test_groups_of_one_image_are_dealt_as_evenly_as_images():
    points = torch.randn(23, 3, generator=torch.Generator().manual_seed(0))
    for split in ("contiguous", "similar"):
        alone = deal_images(split, 4, torch.zeros(23).long(), points, 0, torch.arange(23))
        plain = deal_images(split, 4, torch.zeros(23).long(), points, 0)
        spread = [max(map(len, shards)) - min(map(len, shards)) for shards in (alone, plain)]
        assert spread[0] <= 1 + spread[1]


def test_whole_groups_move_to_the_next_shard():
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 5, 5])
    members = [torch.arange(6), torch.arange(6, 12)]
    skips = [torch.tensor([1, 1, 3, 3, 3, 2] + [0] * 6), torch.tensor([0] * 6 + [0, 1, 5, 5, 2, 2])]
    found = exchange_images(members, skips, RedistributionConfig(share=0.5), 0, groups)
    # half is three images: all of group 1; of the other shard group 4 and no more, since each has two
    assert [set(rows.tolist()) for rows in found] == [{0, 1, 5, 8, 9}, {6, 7, 10, 11, 2, 3, 4}]


def propose(folder):
    seen = summarize_folder(folder, lambda title, done, total: None)
    return seen.look.group, seen


def test_init_proposes_a_group_where_one_shows(tmp_path):
    fill_pool(tmp_path / "a")
    rule, _ = propose(tmp_path / "a")
    assert (
        len(
            {
                record.group
                for images in load(tmp_path / "a", group=rule).values()
                for record in images.records
            }
        )
        == 15
    )
    assert fill_by_column(tmp_path / "b") == propose(tmp_path / "b")[0]
    for i in range(60):
        write(tmp_path / "c" / f"person{i // 4}" / f"{i}.png", i)
        write(tmp_path / "classes" / ("cat" if i % 2 else "dog") / f"{i}.png", i)
        write(tmp_path / "numbered" / f"img_{i:03}.png", i)
        write(tmp_path / "few" / f"p{i // 20}_{i}.png", i)
        write(tmp_path / "alike" / ("cat" if i % 2 else "dog") / f"{i // 4:02}_{i % 4}.png", i)
    assert "person" in propose(tmp_path / "c")[0]
    for name in ("classes", "numbered", "few", "alike"):
        assert propose(tmp_path / name)[0] is None, name


def test_init_writes_the_group_and_a_search_says_how_many_there_are(tmp_path):
    fill_pool(tmp_path / "images")
    run("init", "images", cwd=tmp_path, check=True)
    quick = ("inner.budget_images=16", "inner.rounds=1", "rewards.n_samples=16", "rewards.force=true")
    rest = ("rewards.sampling_steps=1", "rewards.confirm=0", "search.trials=0", "search.anchors=[none]")
    done = run("search", "images.yaml", *quick, *rest, cwd=tmp_path, check=True)
    assert "groups: " in done.stderr + done.stdout
    stored = json.loads((tmp_path / "runs/images/split.json").read_text())
    assert sum(stored["groups"].values()) == 15
    shards = ("inner.ensemble.shards=9", "name=b", *quick, *rest, "inner.budget_images=200")
    done = run("search", "images.yaml", *shards, cwd=tmp_path)
    assert done.returncode and "none of which may be in two shards" in done.stderr


def test_an_audit_refuses_a_group_on_both_sides(tmp_path):
    for i in range(12):
        write(tmp_path / "train" / f"p{i // 2}_{i}.png", i)
        write(tmp_path / "holdout" / f"p{9 + i // 2}_{i}.png", 100 + i)
        write(tmp_path / "made" / f"{i}.png", 200 + i)
    places = [tmp_path / name for name in ("made", "train", "holdout")]
    audit(*places, group=r"(p\d+)_")
    write(tmp_path / "holdout" / "p3_77.png", 777)
    with pytest.raises(MemControlError, match="group 'p3' is in train and in holdout"):
        audit(*places, group=r"(p\d+)_")
    with pytest.raises(MemControlError, match="is '.p', which is no regular expression"):
        audit(*places, group="(p")
