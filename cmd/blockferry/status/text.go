package status

import (
	"fmt"
	"io"
	"strings"
	"time"

	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/progress"
)

// WriteText prints the document: each volume, then its replicas indented,
// key:value as DRBD's users know it.
func WriteText(w io.Writer, d *Document) error {
	var b strings.Builder
	for i := range d.Volumes {
		if i > 0 {
			b.WriteByte('\n')
		}
		writeVolume(&b, &d.Volumes[i])
	}
	if len(d.Volumes) == 0 {
		b.WriteString("no volumes\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// line collects key:value pairs and leaves out what is not known.
type line struct{ words []string }

func (l *line) add(key, value string) {
	if value != "" {
		l.words = append(l.words, key+":"+value)
	}
}

func (l *line) to(b *strings.Builder, indent string) {
	if len(l.words) > 0 {
		b.WriteString(indent + strings.Join(l.words, " ") + "\n")
	}
}

func writeVolume(b *strings.Builder, v *Volume) {
	head := line{words: []string{v.Name}}
	head.add("role", v.Role)
	head.add("disk", v.Disk)
	if !v.Up && v.Stage != "secondary" {
		head.add("up", "no")
	}
	if v.Paused {
		head.add("paused", "yes")
	}
	head.to(b, "")
	var where line
	where.add("device", v.Device)
	where.add("path", v.Path)
	if v.SizeBytes > 0 {
		where.add("size", config.FormatSize(v.SizeBytes))
	}
	where.to(b, "  ")
	var now line
	now.add("position", v.Position.String())
	if v.IntervalSeconds > 0 {
		now.add("interval", seconds(v.IntervalSeconds).String())
	}
	if c := v.LastCut; c != nil && c.StalledSeconds != nil {
		now.add("stalled", stall(*c.StalledSeconds))
	}
	if v.CutAt != nil {
		now.add("cut-at", v.CutAt.UTC().Format("2006-01-02T15:04:05.000Z"))
	}
	now.add("fed-by", v.FedBy)
	now.add("peers", strings.Join(v.Peers, ","))
	now.to(b, "  ")
	if c := v.LastCut; c != nil && c.Reason != "" {
		b.WriteString("  cut: " + c.Reason + "\n")
	}
	if k := v.Kept; k != nil {
		fmt.Fprintf(b, "  keeps: %s of epoch %d since %s, waiting for the node that fed it to go on\n", config.FormatSize(int64(k.Bytes)), k.Epoch, k.Since.UTC().Format("2006-01-02T15:04:05Z"))
	}
	writeLease(b, v.Lease)
	writeWhy(b, "  ", v.Reason, v.Advice)
	for i := range v.Replicas {
		writeReplica(b, &v.Replicas[i])
	}
}

func writeLease(b *strings.Builder, v *Lease) {
	if v == nil {
		return
	}
	head := line{words: []string{"lease"}}
	head.add("holder", v.Holder)
	if v.SecondsLeft != nil {
		head.add("left", progress.FormatDuration(seconds(*v.SecondsLeft)))
	}
	if v.Ending {
		head.add("ending", "yes")
	}
	head.to(b, "  ")
	if v.Reason != "" {
		b.WriteString("    lease: " + v.Reason + "\n")
	}
}

func writeReplica(b *strings.Builder, r *Replica) {
	head := line{words: []string{r.Name}}
	if r.Connection != "Connected" {
		head.add("connection", r.Connection)
	}
	head.add("replication", r.Replication)
	head.add("disk", r.Disk)
	head.to(b, "  ")
	var where line
	where.add("node", r.Peer)
	where.add("address", r.Address)
	where.to(b, "    ")
	var now line
	now.add("position", r.Position.String())
	atLeast := ""
	if r.BehindIsMinimum {
		atLeast = ">="
	}
	if r.BehindSeconds != nil {
		now.add("behind", atLeast+progress.FormatDuration(seconds(*r.BehindSeconds)))
	}
	if r.BehindBytes != nil {
		now.add("behind-bytes", atLeast+config.FormatSize(int64(*r.BehindBytes)))
	}
	if r.CutAt != nil {
		now.add("cut-at", r.CutAt.UTC().Format("2006-01-02T15:04:05.000Z"))
	}
	if r.LimitBytes != nil {
		now.add("limit", config.FormatSize(int64(*r.LimitBytes))+"/s")
	}
	now.to(b, "    ")
	if r.TotalBytes != nil && r.DoneBytes != nil && *r.TotalBytes > 0 {
		var move line
		move.add("sending", r.Mode)
		move.add("done", fmt.Sprintf("%d%%", min(100, *r.DoneBytes*100 / *r.TotalBytes)))
		move.add("of", config.FormatSize(int64(*r.TotalBytes)))
		if r.EtaSeconds != nil {
			move.add("eta", progress.FormatDuration(seconds(*r.EtaSeconds)))
		}
		move.to(b, "    ")
	}
	writeWhy(b, "    ", r.Reason, r.Advice)
}

func writeWhy(b *strings.Builder, indent, reason, advice string) {
	if reason != "" {
		b.WriteString(indent + "reason: " + reason + "\n")
	}
	if advice != "" {
		b.WriteString(indent + "to do: " + advice + "\n")
	}
}

// String is the generation's first eight digits and the epoch.
func (p *Position) String() string {
	if p == nil {
		return ""
	}
	return fmt.Sprintf("%.8s/%d", p.Generation, p.Epoch)
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func stall(s float64) string { return fmt.Sprintf("%.1fms", s*1000) }
