// Preloaded into a guest's kernel: its clock is the host's less what is hidden
// from it. File 3 holds that, in nanoseconds. No library is called: the guest's
// kernel has functions of its own by the names of libc's.

struct timespec { long sec, nsec; };

static volatile long *hidden;

static long call(long n, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
	__asm__ volatile("syscall" : "+a"(n) : "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
	return n;
}

int clock_gettime(int clock, struct timespec *t)
{
	enum { mmap = 9, gettime = 228, exit_group = 231, read = 1, shared = 1, monotonic = 1, second = 1000000000 };

	if (!hidden) {
		long at = call(mmap, 0, 4096, read, shared, 3, 0);
		if (at < 0 && at > -4096)
			call(exit_group, 99, 0, 0, 0, 0, 0);
		hidden = (volatile long *)at;
	}
	if (call(gettime, clock, (long)t, 0, 0, 0, 0))
		return -1;
	if (clock == monotonic) {
		long now = t->sec * second + t->nsec - *hidden;
		t->sec = now / second;
		t->nsec = now % second;
	}
	return 0;
}
