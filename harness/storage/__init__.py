"""Results on disk or in a bucket: tables, commits, leases. README.md beside this file explains."""
