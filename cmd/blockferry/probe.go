package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
	"blockferry/protocol"
)

// newProbe is what the udev rules ask about each disk. Not for people.
func newProbe(g *globalOptions) *cobra.Command {
	return &cobra.Command{
		Use:    "probe DEVICE",
		Short:  "Say what a disk is to blockferry, for udev",
		Long:   "Prints BLOCKFERRY_ROLE (volume, cow, metadata or replica) and BLOCKFERRY_VOLUME, a\nUUID, as udev imports them; nothing for a disk that is none of these. Only reads.",
		Hidden: true,
		Args:   exactly(1, "DEVICE"),
		RunE:   func(_ *cobra.Command, args []string) error { return g.probe(args[0]) },
	}
}

func (g *globalOptions) probe(path string) error {
	d, err := blockdev.OpenFile(path, blockdev.OpenOptions{})
	if err != nil {
		return err
	}
	defer d.Close()
	role, uuid, err := volume.Probe(d)
	if err != nil {
		return err
	}
	if role == "" && d.Size() > 0 {
		of, found, err := protocol.ProbeReplica(d)
		if err != nil {
			return err
		}
		if found {
			role, uuid = "replica", volume.UUID(of)
		}
	}
	if role == "" {
		return nil
	}
	if _, err := fmt.Fprintf(g.out, "BLOCKFERRY_ROLE=%s\n", role); err != nil || uuid.IsZero() {
		return err
	}
	_, err = fmt.Fprintf(g.out, "BLOCKFERRY_VOLUME=%s\n", uuid)
	return err
}
