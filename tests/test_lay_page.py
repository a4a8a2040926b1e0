"""The report's first page: what who knows nothing of the field is told, by cases; and that every term of the
pages behind it is explained where it first stands."""

import re
from html import unescape

import pytest
from reported import FULL, MASK, NONE, make_facts, make_record, make_rewards, make_study

from memcontrol.view.glossary import gloss_sections
from memcontrol.view.lay_page import render_lay_page
from memcontrol.view.lay_words import (
    find_subject,
    write_lay_certainty,
    write_lay_membership,
    write_lay_quality,
    write_lay_verdict,
)
from memcontrol.view.report import render_page

CLEAN = make_rewards(25.5, copied=1, auc=0.69)
COPYING = make_rewards(26.8, copied=52, auc=0.99, told=0.8, p=0.001)


def make_trio(pick=CLEAN, full=COPYING):
    """No training, full fine-tuning, and a mask, which is the pick unless full fine-tuning alone has
    ended."""
    records = [make_record(0, NONE, make_rewards(84.7), "none")]
    records += [make_record(1, FULL, full, "full")] if full else []
    return [*records, make_record(2, MASK, pick)] if pick else records


def read_page(facts):
    text = unescape(re.sub(r"<[^>]*>", " ", render_lay_page(facts, False))).replace("\N{NO-BREAK SPACE}", " ")
    return " ".join(text.split())


def test_a_pick_that_does_not_copy_stands_beside_chance_and_full_fine_tuning():
    subject = find_subject(make_facts(make_trio()))
    assert write_lay_verdict(subject) == (
        "No copying is seen in the chosen model: of 256 pictures that it made, 1 (0.4 %) comes as near to a "
        "training image as a copy would, where chance alone puts about 3 (1.0 %); full fine-tuning, which "
        "changes the whole model, does copy: 52 (20.3 %) of its 256 pictures."
    )
    assert write_lay_certainty(subject) == (
        "Of many more pictures, between 0.1 % and 2.2 % would come so near (with 95 % certainty), so copying "
        "that is rarer than one picture in 46 may have been missed."
    )
    assert write_lay_quality(subject).startswith(
        "Its pictures are as like real ones as those of full fine-tuning"
    )


@pytest.mark.parametrize(
    ("full", "ends"),
    [
        (make_rewards(26.8, copied=2), ", shows no copying: 2 (0.8 %) of its 256 pictures."),
        (make_rewards(26.8, copied=2, leaning=0.001), ", leans towards them: 2 (0.8 %) of its 256 pictures."),
        ({"fid": 26.8, "memorization": 0.1}, "; there is no full fine-tuning to compare it with."),
    ],
)
def test_full_fine_tuning_need_not_copy(full, ends):
    facts = make_facts(make_trio(full=full))
    facts["trials"][1]["pick"], facts["trials"][2]["pick"] = False, True
    said = write_lay_verdict(find_subject(facts))
    assert said.endswith(ends)


def test_a_pick_that_copies_is_said_to_copy_first():
    facts = make_facts(make_trio(pick=make_rewards(20.0, copied=52, p=0.001)))
    facts["trials"][1]["pick"], facts["trials"][2]["pick"] = False, True
    said = write_lay_verdict(find_subject(facts))
    assert said.startswith("Yes, the chosen model copies training images: of 256 pictures that it made, 52")
    assert said.endswith("does copy too: 52 (20.3 %) of its 256 pictures.")
    assert "this test would call about one a copier" in write_lay_certainty(find_subject(facts))


def test_clear_copies_are_told_by_themselves():
    facts = make_facts(make_trio(pick=make_rewards(20.0, copied=3, clear=2)))
    facts["trials"][1]["pick"], facts["trials"][2]["pick"] = False, True
    said = write_lay_verdict(find_subject(facts))
    assert "2 so near to a training image that chance puts not even one there, and 3 (1.2 %) come" in said


def test_copies_in_another_sense_are_told_in_that_sense():
    """Where the pixels of whole images show nothing, and parts of them do."""
    rewards = make_rewards(20.0, copied=1, p=0.001)
    rewards |= {"local_copy_rate": 0.25, "local_copy_rate_low": 0.2, "local_copy_rate_high": 0.31}
    facts = make_facts(make_trio(pick=rewards, full=None))
    said = write_lay_verdict(find_subject(facts))
    assert "64 (25.0 %) come as near to a training image as a copy would, in a part of the picture" in said
    assert said.endswith("; there is no full fine-tuning to compare it with.")


def test_the_chosen_model_is_told_of_where_it_looks_worst_and_not_where_full_fine_tuning_does():
    pick = {**make_rewards(20.0, copied=1), "local_copy_rate": 9 / 256, "local_copy_rate_swapped": 0.0}
    full = {
        **make_rewards(26.8, copied=52, p=0.001),
        "local_copy_rate": 30 / 256,
        "local_copy_rate_swapped": 0.0,
    }
    facts = make_facts(make_trio(pick=pick, full=full))
    facts["trials"][1]["pick"], facts["trials"][2]["pick"] = False, True
    said = write_lay_verdict(find_subject(facts))
    assert "9 (3.5 %) come as near to a training image as a copy would, in a part of the picture" in said
    assert said.endswith("does copy: 30 (11.7 %) of its 256 pictures.")


def test_a_leaning_is_no_copying():
    facts = make_facts(make_trio(pick=make_rewards(25, copied=2, leaning=0.001)))
    said = write_lay_verdict(find_subject(facts))
    assert said.startswith("No single picture of the chosen model is shown to be a copy, but on average they")


def test_a_pick_that_is_full_fine_tuning_is_compared_with_nothing():
    facts = make_facts(make_trio(pick=None))
    said, page = write_lay_verdict(find_subject(facts)), read_page(facts)
    assert said.startswith("Yes, the chosen model copies") and "it is full fine-tuning itself" in said
    assert page.count("the chosen model full fine-tuning") == 0  # one column


def test_nothing_finished_is_said_and_no_figure_is_given():
    facts = make_facts(make_trio(pick=None, full=None))
    page = read_page(facts)
    assert "No fine-tuned model is finished yet" in page
    assert "Figures" not in page and "What data protection asks" in page and "It was not measured." in page


def test_figures_of_the_search_are_said_to_be_optimistic_until_the_pick_is_retrained():
    page = read_page(make_facts(make_trio()))
    assert "has not been retrained" in page and "memcontrol retrain xrays.yaml" in page
    assert "optimistic" in page
    again = [(MASK, make_rewards(26.1, copied=3, auc=0.7)), (FULL, COPYING)]
    page = read_page(make_facts(make_trio(), again))
    assert "Figures on test images" in page and "881 test images" in page and "optimistic" not in page
    assert "of 256 pictures that it made, 3 (1.2 %)" in page
    other = read_page(make_facts(make_trio(), [(FULL, COPYING)]))
    assert "has not been retrained (others have been)" in other


def test_membership_is_told_in_natural_frequencies():
    said = write_lay_membership(find_subject(make_facts(make_trio())))
    assert said.startswith("Something, more than by guessing. Shown a training image beside another")
    named = "would name 12 rightly as such (4 to 24), while wrongly naming 1 of 100 others"
    assert named in said
    assert "points at the right one in 69 of 100 cases (" in said
    assert "After full fine-tuning the same attacker points right in 99 of 100 cases, and names 80" in said


@pytest.mark.parametrize(
    ("rewards", "begins"),
    [
        (make_rewards(25), "Not measured: so nothing is known"),
        (make_rewards(25, auc=0.55), "No more than by guessing, as far as this attack shows."),
        (make_rewards(25, auc=0.97, told=0.9), "Yes, nearly always."),
        (make_rewards(25, auc=0.8, base_auc=0.7), "Not known: the training images differ from"),
    ],
)
def test_membership_says_what_is_known(rewards, begins):
    assert write_lay_membership(find_subject(make_facts(make_trio(pick=rewards)))).startswith(begins)


def test_people_are_told_of_where_images_are_grouped():
    rewards = CLEAN | {"membership_images": 70}
    assert "Of every 100 people" in write_lay_membership(find_subject(make_facts(make_trio(pick=rewards))))


def test_data_protection_is_answered_kind_by_kind_and_no_advice_is_given():
    page = read_page(make_facts(make_trio()))
    for word in ("Opinion 28/2024", "insignificantly likely", "means reasonably likely", "no legal advice"):
        assert word in page, word
    for kind in ("membership inference", "Regurgitation", "Exfiltration", "Model inversion", "minimisation"):
        assert kind in page, kind
    assert "names 12 (4 to 24), and 1 of 100 others wrongly" in page
    assert "No guarantee is proved here" in page and "rewards.extraction: {}" in page


def test_no_sentence_says_that_copied_stands_at_95():
    """The first page that a review board saw began with "copied (95 %) 0.2%"."""
    page = render_page(make_facts(make_study(6)), False)
    text = " ".join(unescape(re.sub(r"<[^>]*>", " ", page)).split())
    assert not re.search(r"copied \(95 %\) [\d<]", text) and "copy rate" in text
    assert "/srv/ward" not in page


def test_the_first_page_comes_first_and_needs_no_word_of_the_field():
    page = render_page(make_facts(make_study(6), doubt="it knows characters"), False)
    assert page.index('class="lay"') < page.index('class="special"')
    lay = read_page(make_facts(make_study(6), doubt="it knows characters"))
    for term in ("AUC", "front", "trial", "LoRA", "anchor", "lora", "epsilon", "hypervolume", "p ="):
        assert not re.search(rf"(?<!\w){re.escape(term)}(?!\w)", lay), term
    assert "knows printed characters" in lay


def test_a_term_is_explained_where_it_first_stands_and_once():
    page = render_page(make_facts(make_study(6)), False)
    special = page[page.index('class="special"') :]
    sections = re.findall(r"<section>.*?</section>", special, flags=re.DOTALL)
    for term, name in {"FID": "FID", "memorization": "memorization, M", "AUC": "membership AUC"}.items():
        place = next(i for i, section in enumerate(sections) if re.search(rf">[^<]*\b{term}\b", section))
        assert f"<dfn>{name}</dfn>" in sections[place]
        assert special.count(f"<dfn>{name}</dfn>") == 1
    for name in ("trial", "front", "anchor", "LoRA", "pick", "mask", "learning rate, lr", "rank, r4"):
        assert special.count(f"<dfn>{name}</dfn>") == 1, name


def test_code_needs_no_explanation():
    plain = "<section><h2>a</h2><p>the front</p></section>"
    code = "<section><h2>a</h2><pre>front</pre></section>"
    assert "<dfn>front</dfn>" in gloss_sections([plain])[0] and "<dfn>" not in gloss_sections([code])[0]
    assert "<dfn>front</dfn>" not in gloss_sections([plain, plain])[1]


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        ({}, "No guarantee is proved here"),
        ({"epsilon": 1000.0}, "No guarantee is proved here"),
        ({"epsilon": 7.96, "privacy_secret": 1.0}, "a guarantee with an epsilon of 7.96."),
        ({"epsilon": 7.96, "privacy_secret": 0.0}, "void against whoever has the study file"),
    ],
)
def test_a_guarantee_is_said_where_the_chosen_model_has_one(bound, said):
    assert said in read_page(make_facts(make_trio(pick=CLEAN | bound)))
