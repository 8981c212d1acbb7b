"""What a long run at a terminal needs: its cost, its parts, its processes, its progress."""
