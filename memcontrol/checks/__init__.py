"""Owns what is looked at before a search: whether the machine, its libraries and services are fit for one."""
