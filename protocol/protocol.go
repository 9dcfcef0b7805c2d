// Package protocol keeps copies of a volume whole: it says what a copy holds
// (Position, Lineage), what must be sent to bring it up to date (Plan), how
// that travels (frames in a session) and how a replica makes an epoch durable
// before it touches the image it already has (Journal, Superblock).
//
// It knows devices only through the interfaces below.
package protocol

import (
	"context"
	"errors"
	"io"
	"time"
)

// BlockSize is the grain of frames, checksums and journals, in bytes.
const BlockSize = 4096

// UnitSize is the coarse level of a checksum comparison, in bytes.
const UnitSize = 64 << 10

// Range is a range of a volume, in bytes; both are multiples of BlockSize.
type Range struct {
	Offset int64
	Length int64
}

// End is the first byte after the range.
func (r Range) End() int64 { return r.Offset + r.Length }

// Store is the device a replica lives on. Offsets and lengths are in bytes
// and multiples of BlockSize. A write is durable only after a later Flush has
// returned nil. All methods may be called from several goroutines at once.
type Store interface {
	io.ReaderAt
	io.WriterAt
	Name() string
	Size() int64
	Flush() error
	ZeroOut(offset, length int64) error
}

// ErrTrackingLost says that what changed since a position can't be known; the
// answer is a comparison of everything, never 'nothing changed'.
var ErrTrackingLost = errors.New("tracking lost")

// ErrPasses is of a cut that failed for what ends by itself, while which another try
// costs next to nothing: it is made after the interval, or a second, each time.
var ErrPasses = errors.New("for the moment")

// Source is the volume a primary replicates. One goroutine at a time calls
// Cut and uses what it returns.
type Source interface {
	io.ReaderAt // the live image: torn while writes go on, yet never older than the last completed write
	// Size is the volume's size in bytes.
	Size() int64
	// Cut fixes a point in time. The number must be larger than any used
	// before. After ErrPasses it is tried again soon, after other errors ever more
	// rarely, as each try may stop writers.
	Cut(ctx context.Context, epoch uint64, wish CutWish) (Cut, error)
	// WrittenBytes counts what was written to the volume since some fixed
	// moment, in bytes; it never decreases while the volume is up.
	WrittenBytes() (uint64, error)
}

// CutWish is what a cut is wanted for.
type CutWish struct {
	// View asks for a frozen image. Without it only the tracker is told: the
	// cut has a number, and Changed an exact border.
	View bool
	// Since: of the image only that is read which changed after this cut, as
	// far as the source can tell. 0: anything may be.
	Since uint64
	// LiveRounds is how often in a row those who wait read the live image
	// instead. A source that can't freeze so much gives no view for a while, so
	// that less is left; it has to decide when that goes on for too long.
	LiveRounds int
}

// Forgetter is a Source that keeps what changed after each cut for as long as
// somebody may ask. Forget says that every replica holds this cut or a later
// one. It is called from several goroutines, and must not wait.
type Forgetter interface {
	Forget(upTo uint64)
}

// Cut is a point in time of a Source. It must be released, also when it is
// not valid any more. View and Changed may be used from several goroutines.
type Cut interface {
	Epoch() uint64
	// View is the frozen image. It is nil when none was asked for, and when
	// NoView says why there is none all the same: too much changed. The live
	// image is to be read then, and another cut to be taken.
	View() io.ReaderAt
	NoView() error
	// WholeView reports whether View holds all of the image, not only what
	// changed after CutWish.Since.
	WholeView() bool
	// Changed lists, in ascending order, the ranges that may have changed
	// between the cut of the given epoch and this one. It may name too much,
	// never too little; when it can't, the error is ErrTrackingLost.
	Changed(since uint64) ([]Range, error)
	// Valid says, after the last read of View, whether all that was read was
	// the frozen image. If not the error says why.
	Valid() error
	// FlushSource makes everything written before the cut durable at the
	// source. It is called once, before the cut's first commit.
	FlushSource() error
	// Stalled is how long writers were stopped for the cut.
	Stalled() time.Duration
	// WrittenBytes is Source.WrittenBytes at the cut.
	WrittenBytes() uint64
	Release() error
}

// DatedCut is a Cut that knows when it was taken. Another one counts as taken when it is there.
type DatedCut interface {
	Cut
	CutUnixNanos() int64 // by the wall clock of whoever took it, for people only
}
