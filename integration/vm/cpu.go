package vm

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// cpus counts the guests that are kept on each of this machine's CPUs.
var cpus = struct {
	sync.Mutex
	guests map[int]int
}{guests: map[int]int{}}

// maxCPUs is how many a unix.CPUSet can name.
const maxCPUs = 1024

// keepOnOneCPU has the calling thread, and what it starts from now on, run on one
// CPU only: of those that it may run on the one with the fewest guests. The caller
// ends the thread, and calls end when its guest has ended.
func keepOnOneCPU() (end func(), err error) {
	var may, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		return nil, fmt.Errorf("the CPUs that a guest may run on: %w", err)
	}
	cpus.Lock()
	defer cpus.Unlock()
	best := -1
	for cpu := range maxCPUs {
		if may.IsSet(cpu) && (best < 0 || cpus.guests[cpu] < cpus.guests[best]) {
			best = cpu
		}
	}
	one.Set(best)
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return nil, fmt.Errorf("keep a guest on CPU %d: %w", best, err)
	}
	cpus.guests[best]++
	return func() {
		cpus.Lock()
		defer cpus.Unlock()
		cpus.guests[best]--
	}, nil
}
