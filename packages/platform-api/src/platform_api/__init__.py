"""The Platform API: challenges, job queue, results and push notifications."""
