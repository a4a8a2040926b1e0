"""Owns how a folder is read: which files are images, what each one shows, what is said of it."""
