"""Studies for the report that nobody searched: records written by hand, marked and picked as those of a study
are."""

import random

from memcontrol.config.load import load_config
from memcontrol.core.choice import Choice
from memcontrol.core.estimate import wilson_interval
from memcontrol.study.pick import choose_trial
from memcontrol.study.record import Record
from memcontrol.view.front_data import mark_trials

OBJECTIVES = {"fid": "minimize", "memorization": "minimize"}
N_SAMPLES = 256
GROUPS = [
    f"{part}_{kind}" for part in ("down", "mid", "up") for kind in ("attention", "cross", "resnet", "norm")
]
BLOCKS = ["conv_in", "time_embedding", *(f"down_blocks.{i}" for i in range(12)), "mid_block"]
BLOCKS += [*(f"up_blocks.{i}" for i in range(12)), "conv_norm_out", "conv_out"]
NONE, FULL = Choice((), "none", 0.0), Choice(("*",), "full", 4.4e-4)
MASK = Choice(tuple(GROUPS[:5]), "lora", 1.58e-3, 4)


def make_rewards(fid=25.0, copied=0, auc=None, told=0.12, p=0.5, leaning=0.3, clear=0, base_auc=0.5):
    """Of N_SAMPLES images, `copied` of which come near to a training image, `clear` ones very near; `auc` and
    `told` are what an attacker tells, who is not there without an AUC."""
    share = copied / N_SAMPLES
    low, high = wilson_interval(share, N_SAMPLES)
    rewards = {"fid": fid, "fid_error": 1.0, "fid_samples_per_feature": 4.0}
    rewards |= {"memorization": 2 * share + 0.02, "memorization_error": 0.01, "memorization_p": leaning}
    rewards |= {"copy_rate": share, "copy_rate_low": low, "copy_rate_high": high, "copy_rate_p": p}
    rewards |= {"copy_rate_line": 0.01, "copying_p": p, "clear_copy_rate": clear / N_SAMPLES}
    rewards["trained_fraction"] = 0.05
    if auc is None:
        return rewards
    rewards |= {"membership_auc": auc, "membership_auc_error": 0.03, "membership_tpr": told}
    rewards |= {"membership_tpr_low": told / 3, "membership_tpr_high": min(2 * told, 1.0)}
    rewards |= {"membership_fpr": 0.01, "membership_base_auc": base_auc, "membership_base_auc_error": 0.03}
    return rewards | {"membership_images": 35, "membership_members": 35, "membership_others": 200}


def make_record(number, choice, rewards, anchor=None, folder=None):
    more = {} if folder is None else {"folder": folder}
    return Record(number, "COMPLETE", (choice,), anchor, choice, OBJECTIVES, rewards, **more)


def make_study(n_trials, seed=0):
    """Anchors and sampled masks, better in one objective where they are worse in the other, with a cloud of
    others behind them."""
    draw = random.Random(seed)
    rewards = [make_rewards(84.7, 0), make_rewards(24.0, 12, 0.8), make_rewards(26.8, 52, 0.99, 0.8, p=0.001)]
    choices = [NONE, Choice(tuple(GROUPS), "lora", 1e-3, 4), FULL]
    anchors = ["none", "all", "full"]
    for _ in range(n_trials):
        groups = tuple(sorted(draw.sample(GROUPS, draw.randint(1, len(GROUPS))), key=GROUPS.index))
        x, worse = draw.random(), draw.random() ** 2
        found = make_rewards(
            22 + 40 * (1 - x) ** 3 + 20 * worse, round(40 * x**3 + 20 * worse), 0.5 + 0.4 * x
        )
        rewards.append(found | {"memorization": 0.004 + 0.2 * x**3 + 0.1 * worse})
        choices.append(Choice(groups, "lora", 10 ** draw.uniform(-4, -2), draw.choice([4, 8])))
    anchors += [None] * n_trials
    return [make_record(i, *one) for i, one in enumerate(zip(choices, rewards, anchors))]


def make_facts(records, retrained=(), doubt="", images=35):
    """What the report of such a study is made from; `retrained`: choices with their rewards."""
    config = load_config({"name": "xrays", "data": {"path": "/srv/ward 3/xrays"}, "space": "sd15-blocks"})
    complete = [record for record in records if record.finished]
    trained = [record for record in complete if record.anchor != "none"]
    trials = mark_trials(records, choose_trial(complete) if trained else None, len(GROUPS))
    draw = random.Random(0)
    for trial in trials:
        trial["blocks"] = [draw.choice([0.0, 0.37, 1.0]) for _ in BLOCKS]
    part = {"images": images, "groups": images, "digest": "0123456789abcdef"}
    again = [
        {
            "said": "again",
            "choice": choice.as_dict(),
            "rewards": rewards,
            "n_samples": N_SAMPLES,
            "run": "/none",
        }
        for choice, rewards in retrained
    ]
    settings = {"settings": {"inner.skip.ratio": "1 to 2"}}
    return {
        "study": "xrays",
        "written": "2026-01-01T10:00",
        "reported_by": "0.1.0",
        "objectives": OBJECTIVES,
        "limits": {},
        "doubt": doubt,
        "data": {
            "source": "xrays",
            "resolution": 64,
            "parts": {"train": part, "holdout": part, "test": {**part, "images": 881}},
            "twins": {},
        },
        "config": config.model_dump(mode="json"),
        "given": config.model_dump(mode="json", exclude_defaults=True),
        "space": {"name": "sd15-blocks", "description": "", "groups": GROUPS, "methods": ["lora"]}
        | {"rank": [4, 8], "learning_rate": {"lora": [1e-4, 1e-2]}}
        | settings,
        "trials": trials,
        "blocks": BLOCKS,
        "hypervolume": None,
        "importance": [_make_effect(name, draw) for name in GROUPS],
        "spread": None,
        "training": [
            dict.fromkeys(("trial", "seen", "trained", "skipped", "dropped", "queued", "surplus"), 1000)
        ],
        "retrained": again,
        "cost": {"runs": len(records), "hours": 3.0, "median_seconds": 60.0},
        "made_with": {"python": "3.11", "torch": "2.13.0", "device": "cpu"},
    }


def _make_effect(name, draw):
    effects = {key: {"value": draw.uniform(-5, 5), "error": 1.0} for key in OBJECTIVES}
    return {"coordinate": name, "from": False, "to": True, "effects": effects}
