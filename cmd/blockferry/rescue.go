package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/protocol"
)

func newRescue(g *globalOptions) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rescue",
		Short: "Look at what a copy alone had when it was given up, or write it back",
		Long:  "When two copies of a volume were both written and one is given up, the blocks that\nonly that one had are saved in a file first. A file is named by volume, generation\nand epoch of the copy.",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var check bool
	show := &cobra.Command{
		Use: "show FILE", Short: "List the ranges that a rescue file holds",
		Long: "Prints where the blocks come from, and the offset and length in bytes of each\nrange, by its place in the volume. --check reads all of it.",
		Args: exactly(1, "FILE"), RunE: func(_ *cobra.Command, args []string) error { return g.rescueShow(args[0], check) },
	}
	show.Flags().BoolVar(&check, "check", false, "read all blocks and compare their checksums")
	cmd.AddCommand(&cobra.Command{
		Use: "list [FOLDER]", Short: "List rescue files",
		Long: "Lists the files of a folder, or of the one in the configuration.",
		Args: atMost(1), RunE: func(_ *cobra.Command, args []string) error { return g.rescueList(args) },
	}, show, &cobra.Command{
		Use: "apply FILE DEVICE", Short: "Write the saved blocks to a device or file",
		Long: "Writes each saved block to its place, after all of the file was checked. The device or\nfile is a copy of the volume as it was, made for this: of the volume's size, not\nmounted, and no disk of blockferry's own. What is there in these places is lost.",
		Args: exactly(2, "FILE or DEVICE"), RunE: func(_ *cobra.Command, args []string) error { return g.rescueApply(args[0], args[1]) },
	})
	return cmd
}

// rescueDocument is what is said of a file.
func rescueDocument(path string, r *protocol.Rescue) map[string]any {
	bytes := int64(0)
	for _, x := range r.Extents() {
		bytes += x.Length
	}
	tip := r.Info.Lineage.Tip()
	return map[string]any{
		"file": path, "volume-uuid": volume.UUID(r.Info.VolumeUUID).String(), "volume-bytes": r.Info.SizeBytes, "saved-bytes": bytes,
		"generation": fmt.Sprintf("%x", tip.Generation), "epoch": tip.Epoch,
		"common-generation": fmt.Sprintf("%x", r.Info.Common.Generation), "common-epoch": r.Info.Common.Epoch,
	}
}

func (g *globalOptions) rescueList(args []string) error {
	dir := ""
	if len(args) > 0 {
		dir = args[0]
	} else {
		c, err := config.Load(g.config)
		if err != nil {
			return err
		}
		dir = c.RescueDir
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) && len(args) == 0 {
		err = nil // nothing was ever saved
	}
	if err != nil {
		return exit.Mark(exit.Failed, err)
	}
	bad := 0
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") || !strings.HasSuffix(e.Name(), ".rescue") {
			continue
		}
		path := filepath.Join(dir, e.Name())
		r, err := protocol.OpenRescue(path)
		if err != nil {
			bad++
			fmt.Fprintln(g.streams.err, "warning:", err)
			continue
		}
		d := rescueDocument(path, r)
		err = g.say(d, "%s: %s of volume %s, of a copy at %v that went its own way after %v", path,
			config.FormatSize(d["saved-bytes"].(int64)), d["volume-uuid"], r.Info.Lineage.Tip(), r.Info.Common)
		if err = errors.Join(err, r.Close()); err != nil {
			return err
		}
	}
	if bad > 0 {
		return exit.Errorf(exit.Failed, "%d files of %s can't be read as rescue files", bad, dir)
	}
	return nil
}

func (g *globalOptions) rescueShow(path string, check bool) error {
	r, err := openRescue(path)
	if err != nil {
		return err
	}
	defer r.Close()
	if check {
		if err := r.Check(); err != nil {
			return exit.Mark(exit.Differs, err)
		}
	}
	d := rescueDocument(path, r)
	if g.json {
		extents := []map[string]int64{}
		for _, x := range r.Extents() {
			extents = append(extents, map[string]int64{"offset": x.Offset, "length": x.Length})
		}
		d["extents"] = extents
		return g.sayJSON(d)
	}
	fmt.Fprintf(g.out, "volume %s, %d bytes\ncopy at %v, replica %x\nin common with what replaced it: %v\nsaved %d bytes (offset, length):\n",
		d["volume-uuid"], r.Info.SizeBytes, r.Info.Lineage.Tip(), r.Info.ReplicaUUID, r.Info.Common, d["saved-bytes"])
	for _, x := range r.Extents() {
		if _, err := fmt.Fprintf(g.out, "%d %d\n", x.Offset, x.Length); err != nil {
			return err
		}
	}
	return nil
}

func openRescue(path string) (*protocol.Rescue, error) {
	r, err := protocol.OpenRescue(path)
	if errors.Is(err, protocol.ErrRescueFile) || errors.Is(err, protocol.ErrNewerFormat) {
		return nil, exit.Mark(exit.Refused, err)
	}
	return r, err
}

func (g *globalOptions) rescueApply(path, to string) error {
	r, err := openRescue(path)
	if err != nil {
		return err
	}
	defer r.Close()
	disk, err := openForRescue(to)
	if err != nil {
		return err
	}
	if err = r.Apply(r.Info.VolumeUUID, disk); errors.Is(err, protocol.ErrRescueFile) || errors.Is(err, protocol.ErrOtherSize) {
		err = exit.Errorf(exit.Refused, "%w; nothing was written", err)
	}
	if err = errors.Join(err, disk.Close()); err != nil {
		return err
	}
	d := rescueDocument(path, r)
	d["device"] = to
	return g.say(d, "%d saved bytes were written to their places on %s", d["saved-bytes"], to)
}

// openForRescue opens what may be written to: nobody uses it, and it is nothing that
// blockferry keeps account of.
func openForRescue(path string) (*blockdev.File, error) {
	disk, err := blockdev.OpenFile(path, blockdev.OpenOptions{Write: true, Exclusive: true})
	if err != nil {
		return nil, exit.Errorf(exit.Refused, "%w; nothing was written", err)
	}
	why := ""
	if info, e := os.Stat(path); e == nil && info.Mode().IsRegular() {
		loops, e := blockdev.LoopsOn(path)
		if err = e; len(loops) > 0 {
			why = "is behind " + strings.Join(loops, ", ")
		}
	}
	if err == nil && why == "" {
		why, err = ownDisk(disk)
	}
	if err == nil && why != "" {
		err = fmt.Errorf("%s %s: name a copy of the volume that nothing else uses", path, why)
	}
	if err != nil {
		return nil, exit.Errorf(exit.Refused, "%w; nothing was written", errors.Join(err, disk.Close()))
	}
	return disk, nil
}

// ownDisk says what a disk is to blockferry; "": nothing.
func ownDisk(disk *blockdev.File) (string, error) {
	role, id, err := volume.Probe(disk)
	if err != nil || role != "" {
		return fmt.Sprintf("is a disk of volume %s (%s)", id, role), err
	}
	of, found, err := protocol.ProbeReplica(disk)
	if err != nil || !found {
		return "", err
	}
	return "is a replica of volume " + volume.UUID(of).String(), nil
}
