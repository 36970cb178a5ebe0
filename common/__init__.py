"""What the scripts share that is no part of learning; each module knows no script."""
