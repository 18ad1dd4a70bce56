"""What `megatron-ext` leaves with, so that a job script can tell the cases apart."""

DONE = 0
FAILED = 1
BAD_INPUT = 2
# EX_TEMPFAIL of sysexits.h: a checkpoint was saved on request; the same command continues the run.
SAVED_AND_STOPPED = 75
