"""Jobs: noticing, claiming, running, delivering, and what is left of them after a crash."""
