package precopy

import (
	"time"

	"blockferry/blockdev"
)

// speed foretells how long reads take: so long for each, so long for each MiB.
// It is fitted to what was measured; what is long past counts less and less.
type speed struct {
	jj, jm, mm, jt, mt float64 // sums of products: jobs, MiB, milliseconds
	bytes              float64 // of a read, of late
}

const (
	speedDecay = 0.6
	// What is assumed of a disk before the first read, with the weight of one
	// round of speedPrior reads, and one of as many MiB.
	speedPrior = 64
	priorJobMS = 0.1
	priorMiBMS = 4.0
)

// add takes a round's measure.
func (s *speed) add(jobs int, bytes int64, took time.Duration) {
	if jobs == 0 {
		return
	}
	j, m, t := float64(jobs), float64(bytes)/(1<<20), took.Seconds()*1000
	for _, sum := range []*float64{&s.jj, &s.jm, &s.mm, &s.jt, &s.mt} {
		*sum *= speedDecay
	}
	s.bytes = float64(bytes) / float64(jobs)
	s.jj, s.jm, s.mm = s.jj+j*j, s.jm+j*m, s.mm+m*m
	s.jt, s.mt = s.jt+j*t, s.mt+m*t
}

// costs is what one read costs, and one MiB, in milliseconds.
func (s *speed) costs() (job, mib float64) {
	const p = speedPrior * speedPrior
	jj, mm := s.jj+p, s.mm+p
	jt, mt := s.jt+p*priorJobMS, s.mt+p*priorMiBMS
	d := jj*mm - s.jm*s.jm
	if d <= 0 {
		return jt / jj, mt / mm
	}
	job, mib = (jt*mm-mt*s.jm)/d, (mt*jj-jt*s.jm)/d
	if job < 0 {
		return 0, mt / mm
	}
	if mib < 0 {
		return jt / jj, 0
	}
	return job, mib
}

// foretell allocates nothing.
func (s *speed) foretell(jobs int, bytes int64) time.Duration {
	job, mib := s.costs()
	return time.Duration((job*float64(jobs) + mib*float64(bytes)/(1<<20)) * float64(time.Millisecond))
}

// readBytes is the size of a read as they were last.
func (s *speed) readBytes() float64 { return max(s.bytes, blockdev.BlockSize) }
