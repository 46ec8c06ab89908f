"""What a submission may take: the limit of size, and what is known to pass where no limit is published."""

MAX_BYTES = 300_000_000  # of model.pth; the organisers say so
KNOWN_SECONDS = 45.0  # in all, starting Python included; entries that took longer ended in HTTP 504
