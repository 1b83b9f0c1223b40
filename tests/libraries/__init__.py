"""Public libraries with their LSTMs moved over: ``make test-libraries``, in environments of their own."""
