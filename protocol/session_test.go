package protocol

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"blockferry/proto"
)

var rewrite = flag.Bool("rewrite", false, "write the outcome of the scripts in testdata instead of comparing it")

// A script is a list of commands, each followed by a line of dashes and the
// exact outcome, up to an empty line. Lines that begin with # are comments.
func TestSessionScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/session/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no scripts", err)
	}
	for _, name := range files {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txt"), func(t *testing.T) {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			run := &sessionScript{t: t}
			for _, part := range strings.Split(strings.TrimSpace(string(b)), "\n\n") {
				command, _, _ := strings.Cut(part, "\n----")
				var comments, lines []string
				for _, l := range strings.Split(command, "\n") {
					if strings.HasPrefix(l, "#") {
						comments = append(comments, l+"\n")
					} else if l != "" {
						lines = append(lines, l)
					}
				}
				out.WriteString(strings.Join(comments, ""))
				if len(lines) == 0 {
					out.WriteString("\n")
					continue
				}
				out.WriteString(strings.Join(lines, "\n") + "\n----\n")
				for _, l := range lines {
					out.WriteString(run.do(l) + "\n")
				}
				out.WriteString("\n")
			}
			got := strings.TrimSpace(out.String()) + "\n"
			if *rewrite {
				if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if want := string(b); got != want {
				g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
				for i := range g {
					if i >= len(w) || g[i] != w[i] {
						t.Fatalf("line %d is\n%s\nwant\n%s", i+1, g[i], w[min(i, len(w)-1)])
					}
				}
				t.Fatalf("%d lines, want %d", len(g), len(w))
			}
		})
	}
}

// sessionScript runs one script's commands.
type sessionScript struct {
	t      *testing.T
	s      *Session
	digest *StreamDigest
	kept   *StreamDigest
	commit EpochCommit
}

var scriptUUID = [16]byte{0xaa, 0xbb}

func (r *sessionScript) do(line string) string {
	fields := strings.Fields(line)
	args := map[string]string{}
	for _, f := range fields[1:] {
		k, v, _ := strings.Cut(f, "=")
		args[k] = v
	}
	num := func(key string, def uint64) uint64 {
		v, ok := args[key]
		if !ok {
			return def
		}
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			r.t.Fatalf("%s: %v", line, err)
		}
		return n
	}
	lineage := func(key string) Lineage {
		var l Lineage
		for _, p := range strings.Split(args[key], ",") {
			if g, e, ok := strings.Cut(p, "/"); ok {
				gn, _ := strconv.Atoi(g)
				en, _ := strconv.Atoi(e)
				l = append(l, Position{gen(byte(gn)), uint64(en)})
			}
		}
		return l
	}
	text := func(key, def string) string {
		if v, ok := args[key]; ok {
			return v
		}
		return def
	}
	switch fields[0] {
	case "replica":
		state := map[string]DiskState{"blank": DiskBlank, "inconsistent": DiskInconsistent, "consistent": DiskConsistent}[text("state", "consistent")]
		var kept *KeptEpoch
		if args["kept"] != "" {
			l := lineage("kept")
			kept = &KeptEpoch{Start: EpochStart{Token: token{'t'}, Epoch: l.Tip().Epoch, Attempt: 3, Mode: ModeJournal, Full: args["kept-full"] != "", Lineage: l},
				Round: 2, Digest: NewStreamDigest()}
			must(r.t, kept.Digest.AddFrames(AppendFrames(nil, FrameMeta{Epoch: l.Tip().Epoch, Attempt: 3, Round: 2}, 0, bytes.Repeat([]byte{5}, BlockSize), nil)))
			r.kept = kept.Digest.Clone()
		}
		r.s = NewSession(SessionConfig{Replica: "ebs", Kept: kept, VolumeUUID: scriptUUID, SizeBytes: int64(num("size", 1<<20)), State: state,
			NeedsFull: args["needs-full"] != "", Strayed: args["strayed"], Lineage: lineage("lineage"), WindowBytes: num("window", 1<<20), JournalFreeBytes: num("journal", 1<<30)})
		return "ok"
	case "granted":
		r.s.Granted(int(num("bytes", 0)))
		return "ok"
	case "committed":
		r.s.Committed(r.commit)
		return "ok"
	case "told":
		r.s.Told(lineage("since").Tip())
		return "ok"
	}
	m := &proto.FromPrimary{}
	switch fields[0] {
	case "hello":
		h := &proto.Hello{Version: uint32(num("version", 1)), MinVersion: uint32(num("min", 1)), Volume: "data", VolumeUuid: scriptUUID[:],
			SizeBytes: num("size", 1<<20), Replica: text("replica", "ebs"), HashKey: make([]byte, num("key", 16)), Lineage: lineage("lineage").Proto(),
			Features: strings.Split(text("features", "zstd,s2,compare,future"), ",")}
		if args["uuid"] == "other" {
			h.VolumeUuid = make([]byte, 16)
		}
		m.Message = &proto.FromPrimary_Hello{Hello: h}
	case "begin":
		mode := map[string]proto.Mode{"journal": proto.Mode_MODE_JOURNAL, "in-place": proto.Mode_MODE_IN_PLACE}[text("mode", "journal")]
		begin := &proto.Begin{Epoch: num("epoch", 11), Attempt: uint32(num("attempt", 1)), Mode: mode,
			Lineage: lineage("lineage").Proto(), Full: args["full"] != "", OverwriteUnrelated: args["overwrite"] != ""}
		if args["discard"] != "" {
			begin.Discard = lineage("discard").Tip().proto()
		}
		if args["token"] != "" {
			begin.Token = append([]byte(args["token"]), make([]byte, num("token-bytes", 16)-1)...)
		}
		m.Message = &proto.FromPrimary_Begin{Begin: begin}
		r.digest = NewStreamDigest()
		if begin.Resume = args["resume"] != ""; begin.Resume {
			r.digest = r.kept.Clone()
		}
	case "frames":
		data := make([]byte, num("len", BlockSize))
		for i := range data {
			data[i] = byte(i%251) + 1
		}
		var b []byte
		for i := range num("count", 1) {
			b = AppendFrames(b, FrameMeta{Epoch: num("epoch", 11), Attempt: uint32(num("attempt", 1)), Round: uint32(num("round", 0))},
				int64(num("offset", 0)+i*uint64(len(data))), data, nil)
		}
		if r.digest != nil {
			if err := r.digest.AddFrames(b); err != nil {
				r.t.Fatal(err)
			}
		}
		if args["flip"] != "" {
			b[FrameHeaderBytes-7] ^= 1
		}
		m.Message = &proto.FromPrimary_Frames{Frames: &proto.Frames{Data: b}}
	case "compare":
		m.Message = &proto.FromPrimary_Compare{Compare: &proto.Compare{Id: num("id", 1), Offsets: []uint64{num("offset", 0)},
			Lengths: []uint32{uint32(num("len", UnitSize))}, UnitHashes: make([]byte, num("hashes", 1)*HashBytes)}}
	case "commit":
		c := &proto.Commit{Epoch: num("epoch", 11), Attempt: uint32(num("attempt", 1))}
		if args["lineage"] != "" {
			c.Lineage = lineage("lineage").Proto()
		}
		if r.digest != nil {
			sum := r.digest.Sum()
			c.Streams = []*proto.StreamSum{{Frames: sum.Frames + num("extra", 0), Digest: sum.Digest[:]}}
		}
		m.Message = &proto.FromPrimary_Commit{Commit: c}
	case "abort":
		m.Message = &proto.FromPrimary_Abort{Abort: &proto.Abort{Epoch: num("epoch", 11), Attempt: uint32(num("attempt", 1)), Reason: "script"}}
	case "ask":
		m.Message = &proto.FromPrimary_AskChanges{AskChanges: &proto.AskChanges{Since: lineage("since").Tip().proto()}}
	case "empty":
	default:
		r.t.Fatalf("unknown command %q", fields[0])
	}
	a, err := r.s.Step(m)
	if err != nil {
		var refused *RefusedError
		if !errors.As(err, &refused) {
			r.t.Fatalf("%s: %v is no refusal", line, err)
		}
		return fmt.Sprintf("refused %v: %s", strings.TrimPrefix(refused.Reason.String(), "REASON_"), refused.Message)
	}
	r.commit = a.Commit
	switch a.Kind {
	case ActWelcome:
		kept := ""
		if k := a.Welcome.Kept; k != nil {
			kept = fmt.Sprintf(" kept epoch=%d attempt=%d frames=%d", k.Epoch, k.Attempt, k.Streams[0].Frames)
		}
		return fmt.Sprintf("welcome version=%d features=%s state=%d window=%d primary=%v%s", a.Welcome.Version, strings.Join(a.Welcome.Features, ","),
			a.Welcome.DiskState, a.Welcome.WindowBytes, a.Peer.Tip(), kept)
	case ActBegin:
		what := "begin"
		if a.Resume {
			what = "resume"
		}
		return fmt.Sprintf("%s epoch=%d attempt=%d mode=%d full=%v lineage=%v", what, a.Start.Epoch, a.Start.Attempt, a.Start.Mode, a.Start.Full, a.Start.Lineage)
	case ActAppend:
		return fmt.Sprintf("append %d bytes", a.Frames.bytes)
	case ActCompare:
		return fmt.Sprintf("compare %v", a.Ranges)
	case ActCommit:
		return fmt.Sprintf("commit epoch=%d frames=%d as %v", a.Commit.Epoch, a.Commit.Streams[0].Frames, a.Commit.Lineage)
	case ActChanges:
		return fmt.Sprintf("changes since %v", a.Since)
	case ActAbort:
		return fmt.Sprintf("abort epoch=%d: %s", a.Start.Epoch, a.Reason)
	}
	return "nothing"
}
