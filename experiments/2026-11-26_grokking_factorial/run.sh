# Called by `make study`: runs what is missing, all seeds of an arm in one block, seven blocks at once.
exec python ../study.py . --jobs 7
