package agent

import (
	"context"
	"sync/atomic"

	"blockferry/cmd/blockferry/exit"
	"blockferry/proto"
)

// restoreProgress is how far a restore is, in bytes.
type restoreProgress struct {
	replica     string
	done, total atomic.Uint64
}

func (m *managed) restoreVolume(ctx context.Context, from string, force bool, send func(*proto.Progress) error) error {
	return exit.Errorf(exit.Failed, "TODO")
}
func (m *managed) restoreHere(ctx context.Context, from string, force bool, send func(*proto.Progress) error) error {
	return exit.Errorf(exit.Failed, "TODO")
}
