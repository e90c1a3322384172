# Called by `make study`: runs what is missing, one run at a time.
exec python ../study.py .
