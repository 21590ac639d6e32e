"""What stands on disk: files that appear whole, folders that bear their maker's mark, locks, and digests."""
