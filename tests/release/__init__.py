"""What a release is made with: ``make dist`` builds and tries it, ``make matrix`` tries it on other versions."""
