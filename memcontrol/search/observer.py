"""Owns the one face of whoever watches a search: the live display, the log, the dashboard's notes."""

from __future__ import annotations

from memcontrol.core.jobs import Event
from memcontrol.study.store import Study


class Observer:
    """Is told what happens, and leaves out what it does not care for."""

    def opened(self, study: Study) -> None:
        """The study is open; before this the images and the base are read."""

    def heard(self, event: Event) -> None:
        """Something was said of a job, or by the search itself."""

    def tick(self) -> None:
        """The search has looked at its workers, as it does every second or so."""

    def over(self) -> None:
        """The search ends; what still runs is interrupted."""

    def broken_off(self) -> None:
        """The search ends by an error. Once this returns, another one may write to the study."""


class Observers(Observer):
    """Several as one."""

    def __init__(self, *observers: Observer):
        self.observers = observers

    def opened(self, study: Study) -> None:
        for observer in self.observers:
            observer.opened(study)

    def heard(self, event: Event) -> None:
        for observer in self.observers:
            observer.heard(event)

    def tick(self) -> None:
        for observer in self.observers:
            observer.tick()

    def over(self) -> None:
        for observer in self.observers:
            observer.over()

    def broken_off(self) -> None:
        for observer in self.observers:
            observer.broken_off()
