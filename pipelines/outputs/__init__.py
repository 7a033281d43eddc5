"""A finished output of a data job, and what is done with one."""
