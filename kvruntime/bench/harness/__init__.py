"""What every benchmark needs: tasks, results that resume, timing, tables."""
