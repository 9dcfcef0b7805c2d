package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/spill"
	"blockferry/protocol"
)

type recoverOptions struct {
	dropJournal   bool
	acceptChanges bool
	spill         string
}

func newRecover(g *globalOptions) *cobra.Command {
	var o recoverOptions
	cmd := &cobra.Command{
		Use:   "recover DEVICE",
		Short: "Make a replica's disk mountable where no agent runs",
		Long:  "Applies what a replica acknowledged but did not apply yet, and prints the point in\ntime that the disk then holds: it mounts as it is, its data begins at offset 0.\nNeeds no configuration and no agent; the disk must not be in use. DEVICE is its path,\nor what it is: serial:NUMBER or model:NAME.\nA mount writes to it; should it have to serve as a replica again, its changed\ncontent must be accepted first, with --accept-changes.",
		Args:  exactly(1, "DEVICE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.recover(cmd.Context(), args[0], o)
		},
	}
	cmd.Flags().BoolVar(&o.dropJournal, "drop-journal", false, "go back to the image before acknowledged changes that can't be applied any more")
	cmd.Flags().BoolVar(&o.acceptChanges, "accept-changes", false, "what was written to it meanwhile, by a mount for one, is its content from now on")
	cmd.Flags().StringVar(&o.spill, "spill", "", "the replica's spill file, if what was acknowledged lies partly in it")
	return cmd
}

func (g *globalOptions) recover(ctx context.Context, path string, o recoverOptions) error {
	disk, err := claim(path)
	if err != nil {
		return err
	}
	defer disk.Close()
	options := protocol.OpenOptions{DropJournal: o.dropJournal}
	if o.spill != "" {
		options.Spill = &spill.File{Path: o.spill}
	}
	replica, err := protocol.OpenReplica(ctx, disk, options)
	switch {
	case errors.Is(err, protocol.ErrTookOver):
		return exit.Errorf(exit.Refused, "%w; to make it a replica again, where it is configured: blockferry secondary VOLUME", err)
	case errors.Is(err, protocol.ErrNoSuperblock):
		return exit.Errorf(exit.Refused, "%s is no replica of blockferry: %w", path, err)
	case errors.Is(err, protocol.ErrUnreadable):
		return exit.Errorf(exit.Refused, "%w; see what the kernel's log says and repeat it; only if that is lost for good, to go back to the image before that, repeat with --drop-journal", err)
	case errors.Is(err, protocol.ErrSpill):
		return exit.Errorf(exit.Refused, "%w; name it with --spill FILE; only if it is lost for good, to go back to the image before that, repeat with --drop-journal", err)
	case errors.Is(err, protocol.ErrJournalDamaged):
		return exit.Errorf(exit.Refused, "%w; to go back to the image before that, repeat with --drop-journal", err)
	case errors.Is(err, protocol.ErrChangedOutside):
		return exit.Errorf(exit.Refused, "%w; to give the image up, which an agent then compares in full, repeat with --drop-journal", err)
	case err != nil:
		return err
	}
	defer replica.Close()
	if o.acceptChanges {
		var fresh protocol.Generation
		if _, err := rand.Read(fresh[:]); err != nil {
			return err
		}
		if err := replica.AcceptChanges(fresh); err != nil {
			return exit.Mark(exit.Refused, err)
		}
	}
	s := replica.Status()
	if s.Err != nil {
		return s.Err
	}
	if s.NeedsFull && s.State == protocol.DiskInconsistent && s.ChangedOutside {
		return exit.Errorf(exit.Refused, "%s was written to by something else than blockferry (%s); to sync it in full from its volume, leave it to the agent; if the volume is lost and this content is good, repeat with --accept-changes",
			path, strings.Join(s.Warnings, "; "))
	}
	if s.State != protocol.DiskConsistent {
		return exit.Errorf(exit.Refused, "%s holds no whole image: it is %s (%s); use another replica", path, s.State, s.Reason)
	}
	for _, w := range s.Warnings {
		fmt.Fprintln(g.streams.err, "warning:", w)
	}
	if s.PendingEpochs > 0 || s.Applied != s.Committed {
		return exit.Errorf(exit.Failed, "%s: %d epochs are not applied, it holds %v and not yet %v; repeat it", path, s.PendingEpochs, s.Applied, s.Committed)
	}
	at := time.Unix(0, s.CutUnixNanos).UTC()
	use := "it can be mounted"
	if s.DataOffset > 0 {
		use = fmt.Sprintf("its data begins at byte %d: losetup --find --show --offset %[1]d --sizelimit %d %s, and mount that", s.DataOffset, s.SizeBytes, path)
	}
	return g.say(map[string]any{
		"device": path, "volume-uuid": volume.UUID(s.VolumeUUID).String(), "size-bytes": s.SizeBytes, "data-offset-bytes": s.DataOffset,
		"generation": fmt.Sprintf("%x", s.Committed.Generation), "epoch": s.Committed.Epoch, "cut-at": at.Format(time.RFC3339Nano),
	}, "%s holds %v of volume %s, cut at %s; %s", path, s.Committed, volume.UUID(s.VolumeUUID), at.Format("2006-01-02 15:04:05.000 UTC"), use)
}
