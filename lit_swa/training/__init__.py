"""Training: the loop's helpers, saving and resuming, several processes, the rehearsal before step 1."""
