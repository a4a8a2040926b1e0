"""Whoever watches a search: several as one, each told of everything in its order."""

from memcontrol.core.jobs import Warned
from memcontrol.search.observer import Observer, Observers


class Noting(Observer):
    def __init__(self, notes, name):
        self.notes, self.name = notes, name

    def opened(self, study):
        self.notes.append((self.name, "opened", study))

    def heard(self, event):
        self.notes.append((self.name, "heard", event))

    def tick(self):
        self.notes.append((self.name, "tick", None))

    def over(self):
        self.notes.append((self.name, "over", None))


def tell_all(observer, study, event):
    observer.opened(study)
    observer.heard(event)
    observer.tick()
    observer.over()


def test_observers_are_told_of_everything_one_after_the_other():
    notes, study, event = [], object(), Warned(None, "why")
    tell_all(Observers(Noting(notes, "a"), Noting(notes, "b")), study, event)
    told = [("opened", study), ("heard", event), ("tick", None), ("over", None)]
    assert notes == [(name, what, of) for what, of in told for name in "ab"]


def test_observer_leaves_out_what_it_does_not_care_for():
    tell_all(Observers(Observer()), object(), Warned(None, "why"))
