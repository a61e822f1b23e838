"""Frames that a Zstandard compressor made, in base 85: vectors must not change with its version.

Of the streams of `repetitive` in _valid_vectors.py: the side file with level 19 and a checksum,
then the index stream and the two value planes with levels 3, 19 and 1.
"""

FRAMES: tuple[str, ...] = (
    "D77#BWbXt;1ptBy84|Fm13x+)2GzEdQl^xAu$|yQcUDLD^YwUh<*bbCW~<T0%2^fF%hh5{m9rwElc_`+Dra^2@Av"
    "$?oR!J9UDM-oR;9jf%TCK#k$9RVIV@*YM8DmV0x$>@9EE`-LO=*31Yf8Tp!xkbz@x%B5E$V`DDVTRKr0K#;bF3oB"
    "*f4$*+>#%=$LFI3GwMd&Tx5iTc}A7I~R@vRZu_`6a|<mtqOA|mq!",
    "D77#BV2J<~1^{Ld9gb#IL^C205C9ke82}mp4<OB62DE<Q>7?1AeOKyLfO@D~i)O<zZ>Gygwa4kgJFpzBp~6{1u(D"
    "?^l_K6mGSaX}4MaZmI8vC0i@azpM)DHt&Eep?Z8s!)B3PmCh>k==Kn|tHUsxB#$wCm>pqGviiXQ+(15m6Zaa&Mpx"
    "@n@T7SlxB-;QO$Bxk^G9}h+{20(A9FpHSk^)<$3)eKi_VMV-QEVNkKv=EeOU@2up2}V2ZZpzqABb!y8",
    "D77#BV2J<~1OS$p9|!O`f2>I+799W_02}~D)zqMgX*CFwhB_^nOAbs6^{Q0UYAghsSi;}|rm@Vc)t{Dlwg!g*ie6"
    "tCiz9BtMp(-3O1pIf8HfT}S1orDUF1|`!jq{!LgsBGomTb~5wrfD-KC-yO$1~uI)RY3$RmteCBj2iX&RxQnu>A&",
    "D77#BV2J>=0|0aa000640000200064000620s;U600II40ssO60s;a600IC20000eAP|Eong;^dpuh#}xmpkbBOf"
    "nd!odmSE)Yiv3{bPQ9S}BAT96pP8-_FBbTAwYGxUT>gI*3$3aJGsRty4z1zv^}$^iz9#1Iq<",
)
